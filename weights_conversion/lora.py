"""LoRA files, read and written in each of their namings (see `keymaps/lora.py`)."""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights_conversion.files import open_file, read_json
from weights_conversion.keymaps import lora as names
from weights_conversion.keymaps.lora import Place

METADATA = "lora_adapter_metadata"
"""Where the header of a safetensors file holds the settings of PEFT, each under `network.setting`, as JSON."""

FILE_STEMS, SUFFIXES = ("pytorch_lora_weights", "adapter_model"), (".safetensors", ".bin")
"""File names in a LoRA's folder: diffusers' and PEFT's; a training of Kolors leaves both."""
NAME = re.compile(r"[\w.-]+")
VARYING = re.compile(r"(?:[\w.|()^$-]|\\[.d]|\[[\d-]+\]|(?<=[\w.\]])[*+])*")
"""Patterns of layers: a name, and a regular expression whose groups are not repeated."""
MOST_REPEATS = 2
SHOWN = 60
"""Characters of a wrong pattern that are shown."""
MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT initialisations that start from the base weights, and change these."""
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: alpha / rank x up @ down, to be added to its weight (LoRA, Hu et al. 2021, section 4.1).

    Attributes:
        down: (rank, in), or (rank, in, kernel height, kernel width) for a convolution.
        up: (out, rank), or (out, rank, 1, 1) for a convolution.
        alpha: the strength it was trained with.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of down."""
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        """The factor of up @ down: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates by network ("unet", "text_encoder") and by our name of the layer."""

    networks: dict[str, dict[str, LowRank]]


# ---- reading


def read_lora(path: str | Path) -> LoRA:
    """Reads a LoRA for Kolors in any naming; its tensors are mapped, not copied.

    path: a .safetensors or .bin file, or a folder that holds it under diffusers' or PEFT's usual name, or one for the
    UNet and one for the text encoder. A layer's alpha is the file's own; where there is none it comes from PEFT's
    settings, in the header or in the adapter_config.json of a folder that PEFT wrote; otherwise it is the rank.

    Raises FileNotFoundError for a missing file; ValueError for one that is damaged, holds code, is not a plain LoRA or
    holds anything that has no place in Kolors, saying what and how many.
    """
    networks: dict[str, dict[str, LowRank]] = {}
    for file in _find_files(Path(path)):
        for network, layers in _read_file(file).items():
            if network in networks:
                raise ValueError(f"{path} holds two LoRAs of the {network}, one in {file.name}: give one file's path.")
            networks[network] = layers
    return LoRA(networks)


def _read_file(path: Path) -> dict[str, dict[str, LowRank]]:
    tensors = open_file(path)
    found = _places(tensors, path)
    settings = _settings(path)
    of_network = {network: _of_network(settings, network, path) for network in {place.network for place in found}}
    networks: dict[str, dict[str, LowRank]] = {}
    for network, layer in dict.fromkeys((place.network, place.layer) for place in found):
        parts = {part: found.get(Place(network, layer, part)) for part in ("down", "up", "alpha")}
        if parts["down"] is None or parts["up"] is None:
            only = next(name for name in parts.values() if name is not None)
            raise ValueError(f"{path} is incomplete: it holds {only!r} without the other matrix of the layer.")
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        if not _fit_together(down, up):
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ValueError(f"{path}: {parts['down']!r} and its twin, {shapes}, are not two matrices of one rank.")
        if parts["alpha"] is not None:
            alpha = _number(tensors[parts["alpha"]], parts["alpha"], path)
        else:
            alpha = _alpha(of_network[network], names.official_layer(network, layer), down.shape[0], path)
        networks.setdefault(network, {})[layer] = LowRank(down, up, alpha)
    return networks


def _find_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [[file for suffix in SUFFIXES if (file := path / (stem + suffix)).is_file()] for stem in FILE_STEMS]
    if not any(found):
        names = " or ".join(stem + SUFFIXES[0] for stem in FILE_STEMS)
        raise FileNotFoundError(f"{path} holds no LoRA: {names} is needed, or the file's own path.")
    return [files[0] for files in found if files]  # one file in two formats is one LoRA


def _places(tensors: Mapping[str, Tensor], path: Path) -> dict[Place, str]:
    """What every tensor of a file is -> its name there."""
    found: dict[Place, str] = {}
    unknown = []
    for name in tensors:
        place = names.to_ours(name)
        if place is None:
            unknown.append(name)
        elif place in found:
            raise ValueError(f"{path} holds the same matrix twice, as {found[place]!r} and {name!r}.")
        else:
            found[place] = name
    for name in unknown:
        for mark, kind in OTHER_KINDS.items():
            if mark in name:
                raise ValueError(f"{path} is a {kind}, as {name!r} tells, and only a plain LoRA is supported.")
    if unknown:
        count = f"{len(unknown)} of the {len(tensors)} tensors"
        raise ValueError(f"{path}: {count} have no place in a LoRA for Kolors, the first is {unknown[0]!r}.")
    if not found:
        raise ValueError(f"{path} holds no tensors.")
    return found


def _fit_together(down: Tensor, up: Tensor) -> bool:
    if down.ndim not in (2, 4) or up.ndim != down.ndim or 0 in down.shape or 0 in up.shape:
        return False
    floating = down.is_floating_point() and up.is_floating_point()
    return floating and up.shape[1] == down.shape[0] and set(up.shape[2:]) <= {1}


def _settings(path: Path) -> dict[str, Any]:
    """The settings of PEFT, from the file's header or from beside it; {} where there are none."""
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        return read_json(beside)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        settings = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {METADATA} in its header is not JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {METADATA} in its header must be a JSON object.")
    return settings


def _of_network(settings: dict[str, Any], network: str, path: Path) -> dict[str, Any]:
    """The settings of one network, which in a header are prefixed with its name."""
    prefix = f"{network}."
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)} or settings
    begun = own.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(MOVED_BASES):
        raise ValueError(f"{path} was begun with {begun[:SHOWN]!r}, which moves the base: convert it to a plain LoRA.")
    return own


def _alpha(settings: dict[str, Any], official: str, rank: int, path: Path) -> float:
    """A layer's alpha by the settings of PEFT, whose patterns match the end of a layer's name."""
    alpha, patterns = settings.get("lora_alpha", rank), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern is {patterns!r}, and an object of names and numbers is needed.")
    for pattern, value in patterns.items():
        if _fits(pattern, official, path):
            alpha = value
            break
    alpha = _number(alpha, "lora_alpha", path)
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha  # rsLoRA divides by the root of the rank


def _fits(pattern: str, official: str, path: Path) -> bool:
    """Whether a pattern is for a layer: its whole name, or the end of it from a dot on.

    PEFT's patterns are regular expressions. A file may come from anywhere, and some expressions take for ever; so only
    names are understood, and names whose numbers or parts vary.
    """
    if NAME.fullmatch(pattern):
        return f".{official}".endswith(f".{pattern}")
    try:
        if not VARYING.fullmatch(pattern) or pattern.count("*") + pattern.count("+") > MOST_REPEATS:
            raise re.error("only names are, with \\d+ or .* for what varies")
        return re.match(rf"(.*\.)?({pattern})$", official) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {pattern[:SHOWN]!r} in alpha_pattern is not understood: {error}.") from None


def _number(value: Any, name: str, path: Path) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{path}: {name!r} must be one finite number.")
    return float(value)


# ---- writing


def save_lora(path: str | Path, lora: LoRA, naming: str = "peft", force: bool = False) -> None:
    """Writes a LoRA as a .safetensors file: beside its place first, under its own name only once it is whole.

    naming: "peft" (alphas in the header, as diffusers writes and reads them), "diffusers" (its older names, which have
    no place for an alpha: the strength is multiplied into `up`, rounded to its dtype) or "kohya".
    force: replace a file that is already there.

    Raises ValueError for an unknown naming, another suffix, an empty LoRA, a layer that Kolors does not have or a
    strength that overflows in `up`; FileExistsError for a path that is taken; FileNotFoundError for one without a
    parent folder; OSError for a full disk.
    """
    path = Path(path)
    if naming not in names.NAMINGS:
        raise ValueError(f"The naming {naming!r} cannot be written, only {', '.join(names.NAMINGS)} can.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end with .safetensors.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist or is not a folder: create it first.")
    if path.is_dir() or (path.exists() and not force):
        raise FileExistsError(f"{path} exists already: choose another name or use force.")
    tensors = {
        names.to_official(Place(network, layer, part), naming): tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for network, updates in lora.networks.items()
        for layer, low_rank in updates.items()
        for part, tensor in _parts(low_rank, naming).items()
    }
    if not tensors:
        raise ValueError(f"{path} is not written: the LoRA is empty.")
    metadata = {"format": "pt"}
    if naming == "peft":
        metadata[METADATA] = json.dumps(_peft_settings(lora), indent=2, sort_keys=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:  # what the library makes of a full disk and its like
        raise OSError(f"{path} cannot be written: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)  # gone already where all went well


def _parts(low_rank: LowRank, naming: str) -> dict[str, Tensor]:
    if naming == "peft":
        return {"down": low_rank.down, "up": low_rank.up}
    if naming == "diffusers":
        up = (low_rank.up.double() * low_rank.strength).to(low_rank.up.dtype)
        if up.isinf().any():
            raise ValueError(f"An update times its strength, {low_rank.strength:g}, overflows: choose another naming.")
        return {"down": low_rank.down, "up": up}
    alpha = torch.tensor(low_rank.alpha, dtype=torch.float64)
    return {"down": low_rank.down, "up": low_rank.up, "alpha": alpha.float() if alpha == alpha.float() else alpha}


def _peft_settings(lora: LoRA) -> dict[str, Any]:
    """What PEFT needs to know to build the updates: the commonest rank and alpha, and every layer that has another."""
    settings: dict[str, Any] = {}
    for network, updates in lora.networks.items():
        official = {names.official_layer(network, layer): low_rank for layer, low_rank in updates.items()}
        rank = Counter(low_rank.rank for low_rank in official.values()).most_common(1)[0][0]
        alpha = Counter(low_rank.alpha for low_rank in official.values()).most_common(1)[0][0]
        own = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: low_rank.rank for name, low_rank in official.items() if low_rank.rank != rank},
            "alpha_pattern": {name: low_rank.alpha for name, low_rank in official.items() if low_rank.alpha != alpha},
            "target_modules": sorted(official),
        }
        settings |= {f"{network}.{setting}": value for setting, value in own.items()}
    return settings
