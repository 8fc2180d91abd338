"""A whole checkpoint in diffusers and in ours: every network's error, and one picture's.

    pytest tests/parity --checkpoint DIR [--dtype float16] [--device cuda]

Without --checkpoint a small random one is taken. One network is in memory at a time; in half precision also the
oracle's in float32, to measure what rounding costs the oracle itself: ours may be off by half as much again. A network
too large for that has a fixed bound.
"""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from parity.oracle import TOLERANCE, relative_error

from kolors_ref import KolorsPipeline
from kolors_ref.loading import load_network
from kolors_ref.sampling import NoiseSchedule, read_scheduler_config
from kolors_ref.text_layout import packed_layout, padded_layout
from kolors_ref.tokenizer import Tokenizer
from weights_conversion import open_checkpoint
from weights_conversion.files import find_weights

ORACLES = {"text_encoder": ChatGLMModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
PROMPTS = ["", "一只可爱的猫 sitting on a red sofa, 4K", "A photo of a ladybug, macro, zoom, high quality, film"]
LARGEST_IN_FLOAT32 = 3e9  # parameters: 12 GB
BOUND = {torch.float16: 0.0125, torch.bfloat16: 0.1}  # 28 layers' roundings of 2^-11 and 2^-8, two networks apart
PICTURE_BOUND = {torch.float16: 0.02, torch.bfloat16: 0.05}  # on the mean over all pixels

pytestmark = pytest.mark.usefixtures("plain_arithmetic")


@pytest.fixture
def plain_arithmetic(monkeypatch):
    """No gradients, and no TF32 where float32 is asked for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


def load_oracle(checkpoint, name, dtype, device):
    weights = find_weights(checkpoint / name, None)
    variant = "fp16" if weights is not None and ".fp16" in weights.name else None
    network = ORACLES[name].from_pretrained(checkpoint, subfolder=name, torch_dtype=dtype, variant=variant)
    return network.to(device).eval()


def load_ours(checkpoint, name, dtype, device):
    return load_network(open_checkpoint(checkpoint).networks[name], dtype, device)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def natural(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_inputs(checkpoint, config):
    return Tokenizer(open_checkpoint(checkpoint).tokenizer)(PROMPTS)


def unet_inputs(checkpoint, config):
    side = min(config["sample_size"], 32)
    return {
        "latents": natural(2, config["in_channels"], side, side, seed=1),
        "text": natural(2, 40, config["text_dim"], seed=2),
        "pooled": natural(2, config["pooled_dim"], seed=3),
        "sizes": torch.tensor([[1024.0, 768.0, 0.0, 32.0, 512.0, 512.0], [256.0, 256.0, 0.0, 0.0, 256.0, 256.0]]),
    }


def vae_inputs(checkpoint, config):
    return {
        "pixels": natural(1, 3, 192, 128, seed=1).tanh(),
        "latents": natural(1, config["latent_channels"], 24, 16, seed=2),
    }


def official_text(network, tokens, dtype, device):
    """The sequence's real tokens, its pads and the pooled embeddings."""
    inputs = {name: tensor.to(device) for name, tensor in vars(tokens).items()}
    states = network(**inputs, output_hidden_states=True).hidden_states
    sequence = states[-2].transpose(0, 1)
    mask = tokens.attention_mask.bool()
    tokens_, pads, pooled = sequence[mask], sequence[~mask], states[-1][-1]
    return {"tokens": tokens_, "pads": pads, "pooled": pooled, "tokens, packed": tokens_, "pooled, packed": pooled}


def our_text(network, tokens, dtype, device):
    padded, packed = padded_layout(tokens).encode(network), packed_layout(tokens).encode(network)
    mask = tokens.attention_mask.bool()
    return {
        "tokens": padded.sequence[mask],
        "pads": padded.sequence[~mask],
        "pooled": padded.pooled,
        "tokens, packed": packed.sequence[mask[:, -packed.sequence.shape[1] :]],
        "pooled, packed": packed.pooled,
    }


def official_unet(network, inputs, dtype, device):
    latents, text, pooled, sizes = (tensor.to(device, dtype) for tensor in inputs.values())
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    return {
        f"noise at {t}": network(latents, t, encoder_hidden_states=text, added_cond_kwargs=conditions).sample
        for t in (1000, 400, 1)
    }


def our_unet(network, inputs, dtype, device):
    latents, text, pooled, sizes = (tensor.to(device, dtype) for tensor in inputs.values())
    context = network.prepare(text, pooled, sizes)
    return {f"noise at {t}": network(latents, t, context) for t in (1000, 400, 1)}


def official_vae(network, inputs, dtype, device):
    scale = network.config.scaling_factor
    posterior = network.encode(inputs["pixels"].to(device, dtype)).latent_dist
    picture = network.decode(inputs["latents"].to(device, dtype) / scale).sample
    return {"mean": scale * posterior.mean, "deviation": scale * posterior.std, "picture": picture}


def our_vae(network, inputs, dtype, device):
    posterior = network.encode(inputs["pixels"].to(device, dtype))
    picture = network.decode(inputs["latents"].to(device, dtype))
    return {"mean": posterior.mean, "deviation": posterior.std, "picture": picture}


NETWORKS = {
    "text_encoder": (text_inputs, official_text, our_text),
    "unet": (unet_inputs, official_unet, our_unet),
    "vae": (vae_inputs, official_vae, our_vae),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, checkpoint, dtype, device, table):
    dtype = network_dtype(name, dtype)
    network = open_checkpoint(checkpoint).networks[name]
    num_parameters = sum(tensor.numel() for tensor in network.tensors.values())
    prepare, official, our = NETWORKS[name]
    inputs = prepare(checkpoint, network.config)
    if isinstance(inputs, dict):  # rounded once for all
        inputs = {key: tensor.to(dtype) for key, tensor in inputs.items()}

    theirs = official(load_oracle(checkpoint, name, dtype, device), inputs, dtype, device)
    ours = our(load_ours(checkpoint, name, dtype, device), inputs, dtype, device)
    exact = theirs
    if dtype in BOUND and num_parameters <= LARGEST_IN_FLOAT32:
        exact = official(load_oracle(checkpoint, name, torch.float32, device), inputs, torch.float32, device)
    rows = []
    for what, output in exact.items():
        own_error = relative_error(theirs[what], output)
        tolerance = TOLERANCE.get(dtype) or (BOUND[dtype] if exact is theirs else 1.5 * own_error)
        rows.append((f"{name}: {what}", relative_error(ours[what], output), tolerance))
    table += rows
    assert all(theirs[what].std() > 1e-3 for what in theirs)
    for what, error, tolerance in rows:
        assert error <= tolerance, what


def network_dtype(name, dtype):
    """Both pipelines hold the autoencoder in float32 where the rest is in float16, which it overflows."""
    return torch.float32 if (name, dtype) == ("vae", torch.float16) else dtype


# ---------------------------------------------------------------------------------------------------------------------
# One picture
# ---------------------------------------------------------------------------------------------------------------------

STEPS, GUIDANCE_SCALE, PROMPT, NEGATIVE = 4, 5.0, PROMPTS[1], "blurry"


def official_picture(checkpoint, dtype, device, side):
    """diffusers' pipeline in three stages, each with one network: (H, W, 3) in [0, 1]."""
    config = open_checkpoint(checkpoint)
    scheduler = getattr(diffusers, config.scheduler["_class_name"]).from_pretrained(checkpoint, subfolder="scheduler")
    tokenizer = ChatGLMTokenizer(vocab_file=str(config.tokenizer))

    def stage(text_encoder=None, unet=None):
        pipe = diffusers.KolorsPipeline(None, text_encoder, tokenizer if text_encoder else None, unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipe = stage(text_encoder=load_oracle(checkpoint, "text_encoder", dtype, device))
    embeds = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE, device=device)
    del pipe  # with its network, before the next one comes
    pipe = stage(unet=load_oracle(checkpoint, "unet", dtype, device))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    latents = pipe(
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **dict(zip(names, embeds, strict=True)),
    ).images
    del pipe
    dtype = network_dtype("vae", dtype)
    vae = load_oracle(checkpoint, "vae", dtype, device)
    pixels = vae.decode(latents.to(dtype) / vae.config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1))[0].permute(1, 2, 0).float().cpu().numpy()


def our_picture(checkpoint, dtype, device, side):
    """Our pipeline in the same three stages."""
    config = open_checkpoint(checkpoint)
    tokenizer, (schedule, sampler) = Tokenizer(config.tokenizer), read_scheduler_config(config.scheduler)
    no_vae = SimpleNamespace(config=SimpleNamespace(downscale=8))

    def stage(text_encoder=None, unet=None, vae=no_vae):
        return KolorsPipeline(tokenizer, text_encoder, unet, vae, NoiseSchedule(schedule), sampler)

    text = stage(text_encoder=load_ours(checkpoint, "text_encoder", dtype, device)).encode_packed([NEGATIVE, PROMPT])
    denoising = stage(unet=load_ours(checkpoint, "unet", dtype, device)).denoise(
        prompt_embeds=text[1:],
        negative_prompt_embeds=text[:1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(0),
    )
    *_, last = denoising
    del denoising
    return stage(vae=load_ours(checkpoint, "vae", network_dtype("vae", dtype), device)).decode(last.latents, "np")[0]


def test_picture(checkpoint, dtype, device, table):
    """In float32 and finer no pixel is off by more than 1/255; in half precision the mean is bounded."""
    side = 8 * min(open_checkpoint(checkpoint).networks["unet"].config["sample_size"], 32)
    theirs = official_picture(checkpoint, dtype, device, side)
    difference = np.abs(our_picture(checkpoint, dtype, device, side) - theirs)
    what, error, tolerance = "picture: largest difference", difference.max(), 1 / 255
    if dtype in PICTURE_BOUND:
        what, error, tolerance = "picture: mean difference", difference.mean(), PICTURE_BOUND[dtype]
    table.append((what, float(error), tolerance))
    assert theirs.std() > 0.05
    assert error <= tolerance
