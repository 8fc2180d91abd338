"""Random weights in diffusers' layout, small or of Kolors' own sizes: 18 GB in bfloat16, an IP-Adapter 1.6 GB more."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from transformers import CLIPVisionConfig as OfficialCLIPConfig
from transformers import CLIPVisionModelWithProjection

from kolors_ref.config import CLIPVisionConfig, GLMConfig, IPAdapterConfig, UNetConfig, VAEConfig
from kolors_ref.ip_adapter_file import count_cross_attentions, cross_attention_channels
from kolors_ref.models.ip_adapter import IPAdapter
from weights_conversion import open_checkpoint
from weights_conversion.files import write_json, write_safetensors
from weights_conversion.keymaps import KEYMAPS
from weights_conversion.keymaps import ip_adapter as adapter_names

FULL = {"text_encoder": GLMConfig(), "unet": UNetConfig(), "vae": VAEConfig()}
SMALL = {
    "text_encoder": GLMConfig(hidden_size=32, ffn_hidden_size=48, num_layers=3, num_heads=4, head_dim=8),
    "unet": UNetConfig(
        channels=(32, 64, 64),
        transformer_depth=(0, 1, 2),
        num_heads=(2, 4, 4),
        text_dim=32,
        cross_attention_dim=48,
        pooled_dim=32,
        size_embed_dim=8,
        norm_groups=8,
        sample_size=16,
    ),
    "vae": VAEConfig(channels=(8, 16, 16, 24), layers_per_block=1, norm_groups=4),
}
SIZES = {"small": SMALL, "full": FULL}
ADAPTERS = {
    "small": (
        IPAdapterConfig(
            40,
            width=32,
            heads=2,
            num_queries=4,
            ffn=128,
            output_dim=48,
            channels=cross_attention_channels(SMALL["unet"]),
        ),
        CLIPVisionConfig(width=40, layers=3, heads=4, mlp=48, image_size=32, patch_size=8, projection_dim=8),
    ),
    "full": (IPAdapterConfig(), CLIPVisionConfig()),
}
"""The sizes of an IP-Adapter and of the image encoder that it sees through."""

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1100,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

MODEL_INDEX = {
    "_class_name": "KolorsPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": False,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["kolors", "ChatGLMModel"],
    "tokenizer": ["kolors", "ChatGLMTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

STEMS = {"text_encoder": "model", "image_encoder": "model"} | dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model")
SHARD_BYTES = 5 * 10**9
BANK_SIZE = 2**24 - 3  # a prime: no two rows of a matrix begin at the same place of the bank


@cache
def bank() -> torch.Tensor:
    """Normal numbers that every tensor is cut from: drawing 9 thousand million afresh would take minutes."""
    return torch.randn(BANK_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """The tensor of that official name: always the same, and of a scale that keeps activations near 1.

    Gains are spread around 1, biases around 0, matrices go by their fan-in. The numbers are the bank's, over and over,
    from a place that the name decides.
    """
    if name.endswith("inv_freq"):
        return (10000 ** -(torch.arange(shape[0]) / shape[0])).bfloat16()
    is_gain = "norm" in name and name.endswith("weight")
    scale = 1.0 if "embeddings" in name else 1 / math.sqrt(shape[1:].numel())
    scale = 0.2 if len(shape) == 1 else scale
    tensor = torch.empty(shape.numel(), dtype=torch.bfloat16)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % BANK_SIZE
    filled = 0
    while filled < len(tensor):
        piece = bank()[start : start + len(tensor) - filled]
        torch.mul(piece, scale, out=tensor[filled : filled + len(piece)])
        filled, start = filled + len(piece), 0
    return (tensor.add_(1) if is_gain else tensor).view(shape)


class RandomTensors(Mapping):
    """The tensors of a network, official name -> tensor, each made when it is asked for."""

    def __init__(self, network: str, shapes: dict[str, torch.Size]):
        self.network, self.shapes = network, shapes

    def __getitem__(self, name):
        return random_tensor(f"{self.network}.{name}", self.shapes[name])

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(2 * shape.numel() for shape in self.shapes.values())

    def shards(self) -> list["RandomTensors"]:
        """The same tensors in groups of at most SHARD_BYTES."""
        groups, filled = [{}], 0
        for name, shape in self.shapes.items():
            if filled + 2 * shape.numel() > SHARD_BYTES:
                groups.append({})
                filled = 0
            groups[-1][name] = shape
            filled += 2 * shape.numel()
        return [RandomTensors(self.network, group) for group in groups]


def official_configs(configs: dict) -> dict[str, dict]:
    """The content of every network's config.json."""
    return {name: KEYMAPS[name].CONFIG.to_official(asdict(config)) for name, config in configs.items()}


def official_tensors(official: dict[str, dict]) -> dict[str, RandomTensors]:
    """The tensors of diffusers' networks of these official configs; its classes know names and shapes."""
    with torch.device("meta"):
        networks = {
            "text_encoder": ChatGLMModel(ChatGLMConfig(**official["text_encoder"])),
            "unet": UNet2DConditionModel.from_config(official["unet"]),
            "vae": AutoencoderKL.from_config(official["vae"]),
        }
    return {
        name: RandomTensors(name, {key: tensor.shape for key, tensor in network.state_dict().items()})
        for name, network in networks.items()
    }


def clip_config(config: CLIPVisionConfig) -> OfficialCLIPConfig:
    """The official config of an image encoder."""
    return OfficialCLIPConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.projection_dim,
    )


def adapter_tensors(config: IPAdapterConfig, unet: UNetConfig) -> RandomTensors:
    """The tensors of an IP-Adapter's official file; its projections are numbered 1, 3, 5 ... in an order of its own."""
    with torch.device("meta"):
        state = IPAdapter(config).state_dict()
    numbers = {place: 2 * n + 1 for n, place in enumerate(adapter_names.file_order(*count_cross_attentions(unet)))}
    shapes = {}
    for name, tensor in state.items():
        part, index, *rest = name.split(".")
        if part.startswith("to_"):
            shapes[f"ip_adapter.{numbers[int(index)]}.{part}_ip.{rest[0]}"] = tensor.shape
        else:
            shapes[adapter_names.TABLE.to_official(name)] = tensor.shape
    return RandomTensors("ip_adapter", shapes)


@contextmanager
def appearing_whole(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Gives a folder to fill, which takes its final name when it is complete. Raises OSError where space is short."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = num_bytes + 2**24, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB free, and {folder.name} needs {needed / 1e9:.1f} GB.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(folder: Path, tokenizer: Path, size: str) -> None:
    """Writes the checkpoint, or checks that the one in the folder is of this size: a real one serves as well.

    Raises FileNotFoundError without a tokenizer, ValueError for another folder in the way, OSError for a full disk.
    """
    configs = SIZES[size]
    if folder.exists():
        found = open_checkpoint(folder).networks
        if any(name not in found or found[name].config != asdict(config) for name, config in configs.items()):
            raise ValueError(f"{folder} holds a checkpoint of other sizes; choose another folder.")
        return
    if not tokenizer.is_file():
        raise FileNotFoundError(f"there is no {tokenizer}; name Kolors' tokenizer.model with --tokenizer.")
    official = official_configs(configs)
    tensors = official_tensors(official)
    with appearing_whole(folder, sum(network.num_bytes() for network in tensors.values())) as partial:
        for name, network in tensors.items():
            (partial / name).mkdir()
            write_json(partial / name / "config.json", official[name])
            write_network(partial / name, network)
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER)
        (partial / "tokenizer").mkdir()
        write_json(partial / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "ChatGLMTokenizer"})
        shutil.copyfile(tokenizer, partial / "tokenizer" / "tokenizer.model")
        write_json(partial / "model_index.json", MODEL_INDEX)


def write_adapter(folder: Path, size: str) -> None:
    """Writes ip_adapter.safetensors and image_encoder/ into a new folder; what is there already is left as it is.

    Raises OSError for a full disk.
    """
    if folder.exists():
        return
    adapter, clip = ADAPTERS[size]
    tensors = adapter_tensors(adapter, SIZES[size]["unet"])
    official = clip_config(clip)
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(official)
    encoder = RandomTensors("image_encoder", {name: tensor.shape for name, tensor in tower.state_dict().items()})
    with appearing_whole(folder, tensors.num_bytes() + encoder.num_bytes()) as partial:
        (partial / "image_encoder").mkdir()
        write_json(partial / "image_encoder" / "config.json", official.to_dict())
        write_network(partial / "image_encoder", encoder)
        print(f"writing ip_adapter.safetensors, {tensors.num_bytes() / 1e9:.2f} GB", flush=True)
        write_safetensors(partial / "ip_adapter.safetensors", tensors)


def write_network(folder: Path, tensors: RandomTensors) -> None:
    """Writes one file, or several and their index, as diffusers and transformers name them."""
    stem, shards = STEMS[tensors.network], tensors.shards()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        tag = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        print(f"writing {tensors.network}/{stem}{tag}.safetensors, {shard.num_bytes() / 1e9:.2f} GB", flush=True)
        write_safetensors(folder / f"{stem}{tag}.safetensors", shard)
        weight_map |= dict.fromkeys(shard, f"{stem}{tag}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": tensors.num_bytes()}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
