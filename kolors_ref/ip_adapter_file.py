"""IP-Adapter files: the official adapter (.bin or .safetensors) and the official image encoder's folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from weights_conversion.files import (
    check_numbers,
    find_weights,
    is_plain,
    load_pickle,
    open_file,
    open_weights,
    read_json,
)
from weights_conversion.keymaps import clip as clip_names
from weights_conversion.keymaps import ip_adapter as adapter_names

from .config import CLIPVisionConfig, IPAdapterConfig, UNetConfig
from .models.clip import CLIPVision
from .models.ip_adapter import IPAdapter
from .unfilled import unfilled

HEAD_DIM = 64
"""Channels per head of the resampler: the one size that no shape reveals; 64 in every published adapter."""

ASIDE = {"logit_scale", "vision_model.embeddings.position_ids"}
"""Other tensors that a CLIP file may hold, without effect: the training temperature and the position ids 0 ... 576."""


def load_ip_adapter(
    path: str | Path, unet: UNetConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> IPAdapter:
    """Build an IP-Adapter-Plus from its official file, for a UNet of the given sizes; raises as `read_ip_adapter`."""
    config, state = read_ip_adapter(path, unet)
    with unfilled():
        model = IPAdapter(config)
    _fill(model, state, Path(path), dtype, device)
    return model


def read_ip_adapter(path: str | Path, unet: UNetConfig) -> tuple[IPAdapterConfig, dict[str, Tensor]]:
    """Read an official IP-Adapter-Plus file: its sizes, and its tensors under our names, mapped and not copied.

    `path` is a .bin with two nested dictionaries, `image_proj` and `ip_adapter`, or a .safetensors with the same names
    joined by a dot. `unet` tells how the projections, which the file numbers in its own order, are to be sorted.

    Raises FileNotFoundError for a missing file, and ValueError for a file that is damaged, holds code, is another kind
    of adapter, is incomplete, holds something unknown or was made for a UNet of other sizes.
    """
    path = Path(path)
    tensors = _open_nested(path) if path.suffix == ".bin" else open_file(path)
    if "image_proj.latents" not in tensors:
        known = any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors)
        found = "another kind of IP-Adapter" if known else "no IP-Adapter"
        raise ValueError(f"{path} holds {found}: an IP-Adapter-Plus has the tensor image_proj.latents.")
    order = adapter_names.file_order(*count_cross_attentions(unet))
    state = {}
    for name in tensors:
        ours = _our_name(name, order)
        if ours is None:
            raise ValueError(f"{path} holds {name!r}, which an IP-Adapter-Plus for this UNet does not have.")
        state[ours] = tensors[name]
    config = _read_sizes(state, len(order), path)
    _check_names(state, adapter_names.TABLE.names(asdict(config)), path)
    for i, (found, right) in enumerate(zip(config.channels, cross_attention_channels(unet), strict=True)):
        if found != right:
            raise ValueError(f"{path} is made for another UNet: layer {i} has {found} channels instead of {right}.")
    return config, state


def encoder_folder(path: str | Path) -> Path:
    """The default folder of the image encoder of an IP-Adapter's file: beside it."""
    return Path(path).parent.resolve() / "image_encoder"  # the file itself may be a link into a cache


def load_image_encoder(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> CLIPVision:
    """Build the image encoder from its official folder: config.json, and model.safetensors or pytorch_model.bin.

    The folder may hold CLIP's vision tower or all of CLIP, whose text tower is then left aside.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a config that asks for another network
    (such as a `hidden_act` other than quick_gelu) or weights that do not fit it.
    """
    folder = Path(folder)
    where = folder / "config.json"
    official = read_json(where)
    if isinstance(official.get("vision_config"), dict):
        official = official["vision_config"]
    config = CLIPVisionConfig(**clip_names.CONFIG.to_ours(official, str(where)))
    if config.width % config.heads:
        raise ValueError(f"{where}: {config.heads} attention heads do not divide the width {config.width}.")
    weights = find_weights(folder, None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights file: model.safetensors or pytorch_model.bin is needed.")
    tensors, state = open_weights(weights), {}
    for name in tensors:
        if name.startswith(("text_model.", "text_projection.")) or name in ASIDE:
            continue
        ours = clip_names.TABLE.to_ours(name)
        if ours is None:
            raise ValueError(f"{weights} holds {name!r}, which is not the name of a tensor of CLIP's vision tower.")
        if ours not in clip_names.TABLE.unused:
            state[ours] = tensors[name]
    _check_names(state, clip_names.TABLE.names(asdict(config)) - clip_names.TABLE.unused, weights)
    try:
        with unfilled():
            model = CLIPVision(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where} asks for sizes that cannot be built: {str(error).splitlines()[0]}.") from error
    _fill(model, state, weights, dtype, device)
    return model


# ---- the UNet's cross-attentions


def count_cross_attentions(unet: UNetConfig) -> tuple[int, int, int]:
    """The number of cross-attentions on the way down, in the middle and on the way up: 24, 10, 36 officially."""
    down = sum(depth * unet.layers_per_block for depth in unet.transformer_depth)
    up = sum(depth * (unet.layers_per_block + 1) for depth in unet.transformer_depth)
    return down, unet.transformer_depth[-1], up


def cross_attention_channels(unet: UNetConfig) -> tuple[int, ...]:
    """The channels at each cross-attention of the UNet, in order of execution."""
    levels = list(zip(unet.channels, unet.transformer_depth, strict=True))
    down = [c for c, depth in levels for _ in range(depth * unet.layers_per_block)]
    up = [c for c, depth in reversed(levels) for _ in range(depth * (unet.layers_per_block + 1))]
    return (*down, *[unet.channels[-1]] * unet.transformer_depth[-1], *up)


def _our_name(official: str, order: list[int]) -> str | None:
    """Our name for one in a file; a projection's number, 1, 3, 5 ..., becomes its place in order of execution."""
    if official.startswith("ip_adapter."):
        part, number, rest = (*official.split(".", 2), "")[:3]
        n = int(number) if number.isdecimal() else 0
        if n % 2 == 0 or n // 2 >= len(order):
            return None
        official = f"{part}.{order[n // 2]}.{rest}"
    return adapter_names.TABLE.to_ours(official)


# ---- files


def _open_nested(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle with one level of dictionaries, names joined by a dot."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    parts = load_pickle(path)
    if not parts or not isinstance(parts, dict) or not all(is_plain(part) for part in parts.values()):
        raise ValueError(f"{path} does not hold the two dictionaries of dense tensors image_proj and ip_adapter.")
    return {f"{name}.{inner}": tensor for name, part in parts.items() for inner, tensor in part.items()}


def _read_sizes(state: Mapping[str, Tensor], num_layers: int, path: Path) -> IPAdapterConfig:
    """The sizes of an adapter, read off its shapes; those that do not fit together are found when it is built."""
    try:
        _, num_queries, width = state["resampler.queries"].shape
        numbers = {name.split(".")[2] for name in state if name.startswith("resampler.layers.")}
        return IPAdapterConfig(
            image_dim=state["resampler.proj_in.weight"].shape[1],
            width=width,
            depth=len(numbers),
            heads=state["resampler.layers.0.attn.q.weight"].shape[0] // HEAD_DIM,
            head_dim=HEAD_DIM,
            num_queries=num_queries,
            ffn=state["resampler.layers.0.ff.1.weight"].shape[0],
            output_dim=state["resampler.proj_out.weight"].shape[0],
            channels=tuple(state[f"to_k.{i}.weight"].shape[0] for i in range(num_layers)),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is incomplete: the sizes of the adapter cannot be read off it ({error}).") from None


def _check_names(state: Mapping[str, Tensor], expected: set[str], path: Path) -> None:
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"{path} is incomplete: {len(missing)} tensors are missing, the first is our {missing[0]!r}.")
    if extra := sorted(state.keys() - expected):
        raise ValueError(f"{path} holds {extra[0]!r} (our name), which a network of its sizes does not have.")


def _fill(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Put a file's tensors, in `dtype` on `device`, into a model built without memory, and make it ready for use."""
    for name, parameter in model.named_parameters():
        if state[name].shape != parameter.shape:
            found, right = tuple(state[name].shape), tuple(parameter.shape)
            raise ValueError(f"{path}: the tensor {name!r} (our name) has the shape {found} instead of {right}.")
        check_numbers(state[name], f"{path}: the tensor {name!r} (our name)")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    model.eval().requires_grad_(False)
