"""The oracle at small sizes: diffusers' networks with random weights of natural scale, and our twins of them.

Nothing is left at zero or at the identity: a dropped bias or gain, or another epsilon, shows in the output.
"""

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from kolors_ref.config import GLMConfig, UNetConfig, VAEConfig
from kolors_ref.loading import WEIGHTS
from kolors_ref.models.glm import GLMEncoder
from kolors_ref.models.unet import UNet
from kolors_ref.models.vae import VAE
from weights_conversion.keymaps import KEYMAPS

BESIDE = Path(__file__).parents[3] / "shared" / "tokenizer" / "tokenizer.model"
OFFICIAL_TOKENIZER = Path(os.environ.get("KOLORS_TOKENIZER", BESIDE)).resolve()
needs_official_tokenizer = pytest.mark.skipif(
    not OFFICIAL_TOKENIZER.is_file(), reason="KOLORS_TOKENIZER names no file: Kolors' tokenizer.model"
)
TOKENIZER = OFFICIAL_TOKENIZER if OFFICIAL_TOKENIZER.is_file() else WEIGHTS / "tokenizer.model"
"""Kolors' own where it is, else the embedded miniature's: the same code over fewer pieces."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The greatest relative error of a network."""


def glm_config(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_heads=4, head_dim=8, groups=2, eps=1e-5, vocab_size=65024
):
    """A config of diffusers' ChatGLMModel."""
    return {
        "num_layers": num_layers,
        "padded_vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "kv_channels": head_dim,
        "num_attention_heads": num_heads,
        "multi_query_group_num": groups,
        "layernorm_epsilon": eps,
        "seq_length": 512,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "original_rope": True,
    }


def unet_config(
    channels=(32, 64, 64),
    depth=(0, 1, 2),
    num_heads=(2, 4, 4),
    layers_per_block=2,
    text_dim=32,
    pooled_dim=32,
    cross_attention_dim=48,
    size_embed_dim=8,
    norm_groups=8,
):
    """A config of diffusers' UNet2DConditionModel; a depth of 0 is a level without attention."""
    return {
        "sample_size": 16,
        "block_out_channels": list(channels),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        "layers_per_block": layers_per_block,
        "transformer_layers_per_block": [max(d, 1) for d in depth],
        "attention_head_dim": list(num_heads),
        "norm_num_groups": norm_groups,
        "cross_attention_dim": cross_attention_dim,
        "encoder_hid_dim": text_dim,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_embed_dim,
        "projection_class_embeddings_input_dim": pooled_dim + 6 * size_embed_dim,
        "use_linear_projection": True,
    }


def vae_config(channels=(8, 16, 16, 24), layers_per_block=1, latent_channels=4, norm_groups=4, scaling_factor=0.13025):
    """A config of diffusers' AutoencoderKL."""
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": norm_groups,
        "scaling_factor": scaling_factor,
    }


ORACLES = {
    "text_encoder": lambda config: ChatGLMModel(ChatGLMConfig(**config)),
    "unet": lambda config: UNet2DConditionModel(**config),
    "vae": lambda config: AutoencoderKL(**config),
}
OURS = {"text_encoder": (GLMEncoder, GLMConfig), "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig)}


def randomise(module, seed=0):
    """Gives every parameter random values of natural scale: gains around 1, biases around 0, weights by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            noise = 0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embeddings" not in name or "patch" in name:
            noise = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(noise)
    return module.eval().requires_grad_(False)


def oracle_network(name, config, seed=0):
    """The oracle's network ("text_encoder", "unet" or "vae") of an official config, with random weights."""
    return randomise(ORACLES[name](config), seed)


def twin(name, oracle, config):
    """Our network with the oracle's weights, in its dtype; built from the same official config."""
    model, config_class = OURS[name]
    table, fields = KEYMAPS[name].TABLE, KEYMAPS[name].CONFIG
    with torch.device("meta"):
        ours = model(config_class(**fields.to_ours(config, "the test's config")))
    state = {table.to_ours(key): tensor for key, tensor in oracle.state_dict().items()}
    ours.load_state_dict({key: tensor for key, tensor in state.items() if key not in table.unused}, assign=True)
    return ours.eval().requires_grad_(False)


def pair(name, config, dtype=torch.float64, seed=0):
    """The oracle's network and ours, with the same random weights in the same dtype."""
    oracle = oracle_network(name, config, seed).to(dtype)
    return oracle, twin(name, oracle, config)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|, both norms over everything, in float64 at least."""
    ours, theirs = ours.double(), theirs.double()
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def assert_parity(ours, theirs, tolerance=None):
    """Both outputs are alike, and theirs is worth comparing: of one format and shape, neither tiny nor huge nor flat.

    Without a tolerance that of the output's dtype holds.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert theirs.isfinite().all()
    assert 0.02 < theirs.std().item() < 50.0
    assert relative_error(ours, theirs) <= (TOLERANCE[theirs.dtype] if tolerance is None else tolerance)


def kolors_scheduler():
    """The official scheduler."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1100,
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def small_pipeline(seed=0, glm=None, unet=None, vae=None):
    """diffusers' KolorsPipeline with small random networks, Kolors' schedule and `TOKENIZER`.

    The configs are official ones, by default those of this file: pictures of 128 x 128, a factor of 8 to the latents,
    a vocabulary of the official size. Its `save_pretrained` writes a checkpoint of some 20 MB, nearly all of it that.
    """
    return KolorsPipeline(
        vae=oracle_network("vae", vae or vae_config(), seed),
        text_encoder=oracle_network("text_encoder", glm or glm_config(), seed + 1),
        tokenizer=ChatGLMTokenizer(vocab_file=str(TOKENIZER)),
        unet=oracle_network("unet", unet or unet_config(), seed + 2),
        scheduler=kolors_scheduler(),
    )
