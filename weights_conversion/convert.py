"""Writes a checkpoint in another layout: beside the destination first, under its own name only once it is whole."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from weights_conversion.checkpoint import GUIDANCE_ENTRY, OUR_INDEX, Checkpoint, Network, open_checkpoint
from weights_conversion.files import FLOATS, STEMS, Tensors, dtype_in_file, write_json, write_safetensors
from weights_conversion.keymaps import KEYMAPS

SHARD_BYTES = 5 * 10**9
"""The text encoder is split into files of at most about this size in the diffusers layout."""

WRITTEN = {OUR_INDEX, "tokenizer.model", *(f"{name}.safetensors" for name in KEYMAPS)}
WRITTEN |= {"model_index.json", "scheduler", "tokenizer", ".DS_Store", *KEYMAPS}
"""The top-level names of both layouts, the only ones that a replaced checkpoint may have."""
PARTS = re.compile(
    rf"({'|'.join(STEMS)})[.\w-]*(\.safetensors|\.bin)(\.index[.\w-]*\.json)?"
    r"|config\.json|configuration\.json|scheduler_config\.json|(special_)?tokenize\w*\.json|added_tokens\.json"
    r"|(configuration|modeling|tokenization)_chatglm\.py|quantization\.py|tokenizer\.model|vocab\.txt|\.DS_Store"
)
"""The files in the folders of a checkpoint, the Kolors team's code among them."""

OnBytes = Callable[[int], Any]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "kolors-ref",
    dtype: torch.dtype | None = None,
    force: bool = False,
    variant: str | None = None,
    progress: bool = False,
) -> None:
    """Writes the checkpoint `source`, in any layout, to the folder `destination` in the layout `to`.

    to: "kolors-ref" or "diffusers". dtype: cast every floating-point tensor, the GLM's rotation frequencies included,
    since the official text encoder rotates in their format. force: replace a checkpoint that is already there.
    Raises what open_checkpoint raises; ValueError for an unknown `to` or `dtype`, an incomplete source, an unsafe
    destination, or a number that `dtype` is too narrow for; FileExistsError for a destination that is in the way or
    also holds something else; FileNotFoundError for one without a parent folder; OSError for a full disk.
    """
    writers = {"kolors-ref": _write_kolors_ref, "diffusers": _write_diffusers}
    if to not in writers:
        raise ValueError(f"The layout {to!r} cannot be written, only {' and '.join(writers)} can.")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"Weights cannot be cast to {dtype}, only to one of {', '.join(map(str, FLOATS))}.")
    source, destination = Path(source), Path(destination)
    checkpoint = open_checkpoint(source, variant)
    _check_complete(checkpoint)
    _check_destination(source.resolve(), destination, force)
    destination = destination.resolve()
    size = sum(_size(network.tensors, dtype) for network in checkpoint.networks.values())
    free = shutil.disk_usage(destination.parent).free
    needed = size + 2**24  # headers, configs and the tokenizer
    if free < needed:
        raise OSError(f"{destination.parent} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed.")
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with tqdm(total=size, desc="converting", unit="B", unit_scale=True, disable=not progress) as bar:
            writers[to](checkpoint, partial, dtype, bar.update)
        _check_destination(source.resolve(), destination, force)  # minutes have passed
        _publish(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well


def _check_complete(checkpoint: Checkpoint) -> None:
    missing = [name for name in KEYMAPS if name not in checkpoint.networks]
    missing += [name for name in ("scheduler", "tokenizer") if getattr(checkpoint, name) is None]
    if missing:
        raise ValueError(f"{checkpoint.path} is not a complete checkpoint: it lacks {', '.join(missing)}.")


def _check_destination(source: Path, destination: Path, force: bool) -> None:
    target = destination.resolve()
    if target == source or target.is_relative_to(source):
        raise ValueError(f"{destination} is the source or lies inside it: choose a folder elsewhere.")
    if source.is_relative_to(target):
        raise ValueError(f"{destination} contains the source: choose a folder elsewhere.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist or is not a folder: create it first.")
    if target.exists() and not force:
        raise FileExistsError(f"{destination} exists already: choose another name or use --force.")
    if target.exists() and not ((target / OUR_INDEX).is_file() or (target / "model_index.json").is_file()):
        raise FileExistsError(f"{destination} is not a checkpoint, and --force replaces nothing else.")
    others = sorted(str(path.relative_to(target)) for path in target.rglob("*") if not _belongs(path, target))
    if others:
        raise FileExistsError(f"{destination} holds {others[0]} too, which --force would delete: move it elsewhere.")


def _belongs(path: Path, target: Path) -> bool:
    """Whether a file or folder below `target` is part of a checkpoint."""
    first, *rest = path.relative_to(target).parts
    if not rest:
        return first in WRITTEN
    return len(rest) == 1 and path.is_file() and PARTS.fullmatch(path.name) is not None


def _size(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    return sum(tensor.numel() * dtype_in_file(tensor, dtype).itemsize for tensor in tensors.values())


def _publish(partial: Path, destination: Path) -> None:
    """Gives the finished folder its name; what stood there before is removed afterwards, or put back on failure."""
    if not destination.exists():
        partial.rename(destination)
        return
    replaced = partial.with_name(f"{partial.name}-replaced")
    destination.rename(replaced)
    try:
        partial.rename(destination)
    except BaseException:
        replaced.rename(destination)
        raise
    shutil.rmtree(replaced)


def _write_kolors_ref(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, on_bytes: OnBytes) -> None:
    index: dict[str, Any] = {"format": "kolors-ref", "version": 1}
    for name, network in checkpoint.networks.items():
        index[name] = network.config
        write_safetensors(folder / f"{name}.safetensors", network.tensors, dtype, on_bytes)
    index["scheduler"] = checkpoint.scheduler
    index["pipeline"] = {"force_zeros_for_empty_prompt": checkpoint.force_zeros_for_empty_prompt}
    if checkpoint.guidance_scale is not None:
        index["pipeline"]["guidance_scale"] = checkpoint.guidance_scale
    write_json(folder / OUR_INDEX, index)
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.model")


def _write_diffusers(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, on_bytes: OnBytes) -> None:
    for name in ("scheduler", "tokenizer", *checkpoint.networks):
        (folder / name).mkdir()
    index = {
        "_class_name": "KolorsPipeline",
        "_diffusers_version": "0.30.0",  # the first that knew Kolors
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": checkpoint.force_zeros_for_empty_prompt,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", checkpoint.scheduler.get("_class_name", "EulerDiscreteScheduler")],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if checkpoint.guidance_scale is not None:
        index[GUIDANCE_ENTRY] = checkpoint.guidance_scale
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer" / "tokenizer.model")
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "ChatGLMTokenizer"})
    for name, network in checkpoint.networks.items():
        write_json(folder / name / "config.json", KEYMAPS[name].CONFIG.to_official(network.config))
        if name == "text_encoder":
            _write_shards(folder / name, _official_names(network), dtype, on_bytes)
        else:
            path = folder / name / "diffusion_pytorch_model.safetensors"
            write_safetensors(path, _official_names(network), dtype, on_bytes)


def _official_names(network: Network) -> Tensors:
    to_official = KEYMAPS[network.name].TABLE.to_official
    return Tensors({to_official(name): (network.tensors, name) for name in network.tensors})


def _write_shards(folder: Path, tensors: Tensors, dtype: torch.dtype | None, on_bytes: OnBytes) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors and their index, as transformers names them."""
    shards: list[dict[str, tuple[Mapping[str, Tensor], str]]] = [{}]
    filled = 0
    for name in tensors:
        size = _size({name: tensors[name]}, dtype)
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = (tensors, name)
        filled += size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype, on_bytes)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        write_safetensors(folder / file_name, Tensors(shard), dtype, on_bytes)
    index = {"metadata": {"total_size": _size(tensors, dtype)}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
