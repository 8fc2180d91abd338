"""A checkpoint in any layout, opened without reading its weights.

The layouts, by the name in `Checkpoint.layout`:

    diffusers   model_index.json; text_encoder/, unet/, vae/ with a config.json each; scheduler/; tokenizer/
    kolors      the Kolors team's own: the same with .bin shards and the tokenizer in text_encoder/
    kolors-ref  ours: kolors-ref.json; text_encoder.safetensors, unet.safetensors, vae.safetensors; tokenizer.model
    unet-file   one .safetensors file with a UNet under diffusers' names, to be put over a base checkpoint
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_conversion.files import Tensors, find_weights, open_file, open_weights, read_json
from weights_conversion.keymaps import KEYMAPS
from weights_conversion.keymaps.fields import read

OUR_INDEX = "kolors-ref.json"
GUIDANCE_ENTRY = "_guidance_scale"
"""Where model_index.json keeps what diffusers has no place for: it skips names that begin with an underscore."""
PIPELINES = (
    "KolorsPipeline",
    "KolorsImg2ImgPipeline",
    "KolorsInpaintPipeline",
    "KolorsPAGPipeline",
    "StableDiffusionXLPipeline",  # the Kolors team's name for its own; the component classes tell it from SDXL's
)
NOT_OURS_TO_CHECK = {"scheduler", "image_encoder", "feature_extractor"}


@dataclass(frozen=True)
class Network:
    """One network: its sizes, with our field names and with the official ones, and its tensors under our names.

    A tensor is mapped from the file when it is asked for; nothing is copied or read before its numbers are used.
    The configs are None for a single UNet file.
    """

    name: str
    config: dict[str, Any] | None
    official_config: dict[str, Any] | None
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Our name -> dtype."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def unused(self) -> list[str]:
        """Names of tensors that the file carries and our network does without."""
        return [name for name in self.tensors if name in KEYMAPS[self.name].TABLE.unused]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: networks by component name, the scheduler's config, the tokenizer's file.

    `guidance_scale` is what it asks to be sampled with; None if it does not say, as none written by diffusers does.
    """

    path: Path
    layout: str
    networks: dict[str, Network]
    scheduler: dict[str, Any] | None = None
    tokenizer: Path | None = None
    force_zeros_for_empty_prompt: bool = False
    guidance_scale: float | None = None


def open_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Opens a checkpoint of any layout: checks files, names and configs, reads no weights.

    path: a folder, or a .safetensors file with a UNet. variant: the files to take where there are several, such as
    "fp16"; without it the plain ones are taken, or the fp16 ones where there are no others.
    Raises FileNotFoundError for a missing file or variant, NotADirectoryError for another kind of file, ValueError
    for a damaged, incomplete or unsupported checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the folder of a checkpoint or a UNet file is needed.")
    if path.is_file():
        return _open_unet_file(path, variant)
    if (path / OUR_INDEX).exists():
        return _open_kolors_ref(path, variant)
    return _open_diffusers(path, variant)


def _open_unet_file(path: Path, variant: str | None) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise NotADirectoryError(f"{path} is a file: the folder of a checkpoint or a .safetensors file is needed.")
    if variant is not None:
        raise ValueError(f"{path} is a single file and has no variant {variant!r}.")
    network = Network("unet", None, None, _to_our_names("unet", open_file(path), path))
    if not network.tensors:
        raise ValueError(f"{path} holds no tensors.")
    return Checkpoint(path, "unet-file", {"unet": network})


def _open_kolors_ref(path: Path, variant: str | None) -> Checkpoint:
    if variant is not None:
        raise ValueError(f"{path} is in the kolors-ref layout and has no variant {variant!r}.")
    where = path / OUR_INDEX
    index = read_json(where)
    if index.get("format") != "kolors-ref" or index.get("version") != 1:
        raise ValueError(f"{where} is not of format 'kolors-ref' and version 1.")
    networks = {}
    for name in KEYMAPS:
        if name in index:
            table = KEYMAPS[name].CONFIG
            config = table.check_ours(index[name], f"{where}: {name}")
            weights = path / f"{name}.safetensors"
            tensors = open_file(weights)
            _check_names(name, config, {ours: ours for ours in tensors}, weights)
            networks[name] = Network(name, config, table.to_official(config), tensors)
    if not networks:
        raise ValueError(f"{where} describes no network: {', '.join(KEYMAPS)} are missing.")
    scheduler, pipeline = index.get("scheduler"), index.get("pipeline", {})
    if not isinstance(scheduler, dict | None) or not isinstance(pipeline, dict):
        raise ValueError(f"{where}: scheduler and pipeline must be objects.")
    tokenizer = _first_file(path / "tokenizer.model")
    force_zeros = _read_flag(pipeline, "force_zeros_for_empty_prompt", f"{where}: pipeline")
    guidance_scale = _read_optional(pipeline, "guidance_scale", f"{where}: pipeline")
    return Checkpoint(path, "kolors-ref", networks, scheduler, tokenizer, force_zeros, guidance_scale)


def _open_diffusers(path: Path, variant: str | None) -> Checkpoint:
    index_path = path / "model_index.json"
    index = read_json(index_path) if index_path.exists() else {}
    if index:
        components = _check_index(index, index_path)
    else:
        components = {name: None for name in (*KEYMAPS, "scheduler") if (path / name).is_dir()}
    networks = {name: _open_network(path / name, name, variant) for name in KEYMAPS if name in components}
    if not networks:
        expected = f"neither {OUR_INDEX} nor model_index.json nor a folder {', '.join(KEYMAPS)}"
        raise ValueError(f"{path} is not a checkpoint: it has {expected}.")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json") if "scheduler" in components else None
    if scheduler is not None and components["scheduler"] is not None:  # the index has the last word, as in diffusers
        scheduler["_class_name"] = components["scheduler"]
    tokenizer = _first_file(path / "tokenizer" / "tokenizer.model", path / "text_encoder" / "tokenizer.model")
    layout = "kolors" if tokenizer is not None and tokenizer.parent.name == "text_encoder" else "diffusers"
    force_zeros = _read_flag(index, "force_zeros_for_empty_prompt", str(index_path))
    guidance_scale = _read_optional(index, GUIDANCE_ENTRY, str(index_path))
    return Checkpoint(path, layout, networks, scheduler, tokenizer, force_zeros, guidance_scale)


def _read_optional(record: dict[str, Any], name: str, where: str) -> float | None:
    return None if record.get(name) is None else read(record, name, float, where)


def _read_flag(record: dict[str, Any], name: str, where: str) -> bool:
    value = record.get(name)
    if value not in (None, False, True):
        raise ValueError(f"{where}: {name} is {value!r}, and true or false is needed.")
    return bool(value)


def _check_index(index: dict[str, Any], where: Path) -> dict[str, str]:
    """The components that a model_index.json lists and the class of each, once checked."""
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"{where}: the pipeline class {index.get('_class_name')!r} is not supported, but KolorsPipeline is."
        )
    classes = {name: module.CONFIG.class_name for name, module in KEYMAPS.items()} | {"tokenizer": "ChatGLMTokenizer"}
    components = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            components[name] = entry[1]
    for name, found in components.items():
        if name not in NOT_OURS_TO_CHECK and found != classes.get(name):
            wanted = classes.get(name, "no such component")
            raise ValueError(f"{where}: {name} is of class {found!r}, and {wanted} is supported.")
    return components


def _open_network(folder: Path, name: str, variant: str | None) -> Network:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist or is not a folder.")
    official = read_json(folder / "config.json")
    config = KEYMAPS[name].CONFIG.to_ours(official, str(folder / "config.json"))
    weights = find_weights(folder, variant)
    if weights is None and name == "text_encoder":  # the Kolors team's .bin shards come without variants
        plain = find_weights(folder, None)
        weights = plain if plain is not None and ".bin" in plain.name else None
    if weights is None:
        wanted = (
            f"of the variant {variant!r}" if variant else "(model or diffusion_pytorch_model, .safetensors or .bin)"
        )
        raise FileNotFoundError(f"{folder} has no weights file {wanted}.")
    tensors = _to_our_names(name, open_weights(weights), weights, config)
    return Network(name, config, official, tensors)


def _to_our_names(name: str, stored: Mapping[str, Tensor], where: Path, config: dict | None = None) -> Tensors:
    table = KEYMAPS[name].TABLE
    sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for official in stored:
        ours = table.to_ours(official)
        if ours is None:
            raise ValueError(f"{where} holds {official!r}, which is not the name of a tensor of the {name}.")
        if ours in sources:
            raise ValueError(f"{where} holds the same tensor twice, as {sources[ours][1]!r} and {official!r}.")
        sources[ours] = (stored, official)
    if config is not None:
        _check_names(name, config, {ours: official for ours, (_, official) in sources.items()}, where)
    return Tensors(sources)


def _check_names(name: str, config: dict, stored_names: dict[str, str], where: Path) -> None:
    """Raises ValueError unless the names (ours -> as stored) are those of a network of these sizes."""
    table = KEYMAPS[name].TABLE
    expected = table.names(config)
    if extra := sorted(stored_names[ours] for ours in stored_names.keys() - expected):
        raise ValueError(f"{where} holds {extra[0]!r}, which a {name} of the sizes in its config does not have.")
    if missing := sorted(expected - stored_names.keys() - table.unused):
        is_ours = all(ours == stored for ours, stored in stored_names.items())
        first = missing[0] if is_ours else table.to_official(missing[0])
        raise ValueError(f"{where} is incomplete: it lacks {len(missing)} of its tensors, the first is {first!r}.")


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
