"""Small checkpoints in every layout, written by diffusers and torch, with random numbers in every tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from safetensors.torch import load_file, save_file

from weights_conversion import convert

UNET = {
    "sample_size": 16,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 4],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}
GLM = {
    "num_layers": 3,
    "padded_vocab_size": 128,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "seq_length": 512,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
}
SHARDS = 7  # of the text encoder in the Kolors team's layout


def randomised(module, seed):
    """The module with a random number in every place of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def small_pipeline(tokenizer=None):
    """diffusers' Kolors with small random networks; the text encoder in half precision, as the official one."""
    return KolorsPipeline(
        vae=randomised(AutoencoderKL(**VAE), 0),
        text_encoder=randomised(ChatGLMModel(ChatGLMConfig(**GLM)), 1).half(),
        tokenizer=tokenizer,
        unet=randomised(UNet2DConditionModel(**UNET), 2),
        scheduler=EulerDiscreteScheduler(num_train_timesteps=1100, beta_end=0.014, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
    )


def add_tokenizer(folder):
    """A stand-in for the tokenizer's file, which conversion only copies."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"not a real tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["kolors", "ChatGLMTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def pipeline():
    """diffusers' pipeline that all small checkpoints hold."""
    return small_pipeline()


@pytest.fixture(scope="session")
def shared_diffusers(pipeline, tmp_path_factory):
    """Layout 1; not to be changed."""
    folder = tmp_path_factory.mktemp("layouts") / "diffusers"
    pipeline.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def shared_fp16(pipeline, tmp_path_factory):
    """Layout 1 with the variant fp16 alone, every network in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("layouts") / "fp16"
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="40KB")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def shared_kolors(shared_diffusers, tmp_path_factory):
    """Layout 2: the text encoder in .bin shards with the tokenizer beside them; not to be changed."""
    folder = tmp_path_factory.mktemp("layouts") / "kolors"
    shutil.copytree(shared_diffusers, folder)
    encoder = folder / "text_encoder"
    tensors = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    shards, weight_map = [{} for _ in range(SHARDS)], {}
    for number, name in enumerate(tensors):
        shard = number % SHARDS
        shards[shard][name] = tensors[name]
        weight_map[name] = f"pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.bin"
    for shard, content in enumerate(shards):
        torch.save(content, encoder / f"pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    (encoder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.move(folder / "tokenizer" / "tokenizer.model", encoder)
    (folder / "tokenizer").rmdir()
    return folder


@pytest.fixture(scope="session")
def shared_ours(shared_diffusers, tmp_path_factory):
    """Our own layout; not to be changed."""
    folder = tmp_path_factory.mktemp("layouts") / "ours"
    convert(shared_diffusers, folder)
    return folder


@pytest.fixture
def diffusers_folder(shared_diffusers, tmp_path):
    """A copy of layout 1 to be changed."""
    return Path(shutil.copytree(shared_diffusers, tmp_path / "diffusers"))


@pytest.fixture
def kolors_folder(shared_kolors, tmp_path):
    """A copy of layout 2 to be changed."""
    return Path(shutil.copytree(shared_kolors, tmp_path / "kolors"))


@pytest.fixture
def ours_folder(shared_ours, tmp_path):
    """A copy of our layout to be changed."""
    return Path(shutil.copytree(shared_ours, tmp_path / "ours"))


@pytest.fixture
def unet_file(shared_diffusers, tmp_path):
    """Layout 3: one file with a UNet."""
    path = tmp_path / "fine-tune.safetensors"
    return Path(shutil.copy(shared_diffusers / "unet" / "diffusion_pytorch_model.safetensors", path))


@pytest.fixture
def edit_json():
    """Changes a JSON file in place: edit_json(path, field=value); the value ... removes the field."""

    def edit(path, **changes):
        value = json.loads(path.read_text())
        value.update(changes)
        path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not ...}))

    return edit


@pytest.fixture
def edit_weights():
    """Changes the tensors of a safetensors file: edit_weights(path, function of the dictionary)."""

    def edit(path, function):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        function(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit
