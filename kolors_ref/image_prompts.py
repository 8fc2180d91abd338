"""Image prompts: from reference pictures, scales and masks to what the UNet attends to besides the text.

The method is IP-Adapter's (Ye et al. 2023). Nothing here depends on the timestep, so it runs once per call; its keys
and values become part of the `Context`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from .arguments import check_finite, check_number
from .config import UNetConfig
from .images import Pictures, clip_pixels, in_8_bits
from .ip_adapter_file import encoder_folder, load_image_encoder, load_ip_adapter
from .models.clip import CLIPVision
from .models.ip_adapter import IPAdapter
from .models.unet import KeyValue, UNet
from .request import Request

# ---------------------------------------------------------------------------------------------------------------------
# The adapters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A loaded IP-Adapter and the image encoder that it sees through, which several adapters may share.

    Attributes:
        encoder_folder: where the image encoder came from.
    """

    model: IPAdapter
    encoder: CLIPVision
    encoder_folder: Path

    def encode(self, pictures: Pictures, guided: bool = True) -> Tensor:
        """Encodes N pictures as (2, N, L, D): CLIP's output for "no picture" first, then that for the pictures.

        "No picture" is an all-zero input to CLIP, as in the adapter's training: a grey picture, not zero features.
        Without guidance it is not needed, and the result is (1, N, L, D).
        """
        pixels = clip_pixels(pictures, self.encoder.config.image_size).to(self.encoder.class_token.device)
        if not guided:
            return check_finite(self.encoder(pixels), "image encoding (CLIP)")[None]
        hidden = self.encoder(torch.cat([torch.zeros_like(pixels[:1]), pixels]))
        check_finite(hidden, "image encoding (CLIP)")
        return torch.stack([hidden[:1].expand_as(hidden[1:]), hidden[1:]])

    def tokens(self, embeds: Tensor) -> Tensor:
        """Maps B rows of N encoded pictures (B, N, L, D) to their image tokens (B, N, T, output_dim)."""
        flat = embeds.flatten(0, 1).to(self.model.resampler.queries.device)
        return self.model.image_tokens(flat).unflatten(0, embeds.shape[:2])


def load_adapter(path: str | Path, image_encoder: str | Path | None, unet: UNet, loaded: Sequence[Adapter]) -> Adapter:
    """Loads an adapter in the UNet's dtype and on its device.

    Args:
        path: the official file, .bin or .safetensors.
        image_encoder: its folder; if None that of the adapter loaded last, or else `image_encoder` beside the file.
        unet: what the adapter is for.
        loaded: the adapters there are; an encoder of theirs from the same folder is shared.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is damaged, or is made for a UNet or an image encoder of other sizes.
    """
    dtype, device = unet.conv_in.weight.dtype, unet.conv_in.weight.device
    model = load_ip_adapter(path, unet.config, dtype, device)
    if image_encoder is not None:
        folder = Path(image_encoder).resolve()
    else:
        folder = loaded[-1].encoder_folder if loaded else encoder_folder(path)
    shared = [adapter.encoder for adapter in loaded if adapter.encoder_folder == folder]
    encoder = shared[0] if shared else load_image_encoder(folder, dtype, device)
    if encoder.config.width != model.config.image_dim:
        raise ValueError(
            f"{path} is made for an image encoder of width {model.config.image_dim}, but the one in {folder} has"
            f" {encoder.config.width}."
        )
    return Adapter(model, encoder, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of the UNet with transformers, each of `depth` cross-attentions; `level` 0 is the full resolution."""

    part: str
    name: str
    level: int
    transformers: int
    depth: int


def attention_blocks(config: UNetConfig) -> list[Block]:
    """Lists the blocks that look at the context, in order of execution, by the names that scales use."""
    last, num = len(config.channels) - 1, config.layers_per_block
    down = [Block("down", f"block_{i}", i, num, depth) for i, depth in enumerate(config.transformer_depth)]
    mid = Block("mid", "block_0", last, 1, config.transformer_depth[-1])
    up = [Block("up", f"block_{last - i}", i, num + 1, depth) for i, depth in enumerate(config.transformer_depth)]
    return [block for block in (*down, mid, *reversed(up)) if block.depth]


def layer_scales(scale: float | Mapping[str, Any], config: UNetConfig) -> list[float]:
    """Returns the scale of every cross-attention, in order of execution: 70 for the official UNet.

    Args:
        scale: one number for all; or {"down": ..., "mid": ..., "up": ...}, each a number, a list with a number for each
            transformer of a block, or {"block_1": ...} of such. What is not named has scale 0. The official UNet has
            down.block_1 and block_2 of two transformers, mid of one, up.block_0 and block_1 of three.

    Raises:
        TypeError, ValueError: a scale is not a finite number, or names what is not there.
    """
    blocks = attention_blocks(config)
    if isinstance(scale, Mapping):
        _check_names(scale, [block.part for block in blocks], "ip_adapter_scale")
    scales = []
    for block in blocks:
        value = scale.get(block.part, 0.0) if isinstance(scale, Mapping) else scale
        if isinstance(value, Mapping):
            names = [other.name for other in blocks if other.part == block.part]
            _check_names(value, names, f"ip_adapter_scale[{block.part!r}]")
            value = value.get(block.name, 0.0)
        values = list(value) if isinstance(value, list | tuple) else [value]
        for number in values:
            check_number("ip_adapter_scale", number)
        if len(values) not in (1, block.transformers):
            raise ValueError(
                f"ip_adapter_scale has {len(values)} numbers for {block.part} {block.name}; it must have one, or one"
                f" for each of its {block.transformers} transformers"
            )
        values = values * block.transformers if len(values) == 1 else values
        scales += [number for number in values for _ in range(block.depth)]
    return scales


def _check_names(scales: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in scales:
        if name not in known:
            raise ValueError(f"{where} names {name!r}; the UNet has attention in {', '.join(dict.fromkeys(known))}")


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def read_masks(mask: Any, height: int, width: int) -> list[Tensor]:
    """Returns masks as tensors (h, w) in [0, 1], 1 where a reference picture counts.

    Args:
        mask: a Pillow image, which is resized to height and width and binarised, middle grey and above being white;
            a tensor or array (h, w), (M, h, w) or (1, M, h, w) of booleans or floats in [0, 1], taken as it is; or a
            list of these.
        height, width: of the picture to be made; a tensor's h and w must be in the same proportion.

    Raises:
        TypeError, ValueError: a mask is none of these.
    """
    if isinstance(mask, list | tuple):
        return [one for item in mask for one in read_masks(item, height, width)]
    if isinstance(mask, Image.Image):
        grey = np.asarray(in_8_bits(mask).resize((width, height), Image.Resampling.LANCZOS).convert("L"))
        return [torch.from_numpy((grey >= 128).astype(np.float32))]
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.from_numpy(np.array(mask, dtype=mask.dtype.newbyteorder("=")))  # of any layout
    if not isinstance(mask, Tensor):
        raise TypeError(f"ip_adapter_mask holds a {type(mask).__name__}; it must be a Pillow image, tensor or array")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"ip_adapter_mask is a tensor of {mask.dtype}; it must be of booleans or floats in [0, 1]")
    if mask.ndim not in (2, 3, 4) or mask.numel() == 0 or mask.shape[-2] * width != mask.shape[-1] * height:
        raise ValueError(
            f"ip_adapter_mask has the shape {tuple(mask.shape)}; it must be (h, w), (M, h, w) or (1, M, h, w) with h"
            f" and w in the proportion of the picture's {height} x {width} pixels"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("ip_adapter_mask has values outside [0, 1]")
    dtype = torch.promote_types(mask.dtype, torch.float32)
    return list(mask.detach().to(dtype).reshape(-1, *mask.shape[-2:]))


def layer_masks(mask: Tensor, unet: UNet, height: int, width: int) -> list[Tensor]:
    """Resizes a mask to the h x w pixels of every cross-attention, in order of execution: each (1, 1, h w, 1).

    height and width are those of the latents. Bicubic, so edges overshoot a little.
    """
    blocks = attention_blocks(unet.config)
    levels = {}
    for level in {block.level for block in blocks}:
        size = [-(-side // 2**level) for side in (height, width)]  # the UNet halves rounding up
        small = F.interpolate(mask[None, None], size=size, mode="bicubic")
        levels[level] = rearrange(small, "1 1 h w -> 1 1 (h w) 1").to(unet.conv_in.weight)
    return [levels[block.level] for block in blocks for _ in range(block.transformers * block.depth)]


# ---------------------------------------------------------------------------------------------------------------------
# From a request to keys and values
# ---------------------------------------------------------------------------------------------------------------------


def encode_pictures(adapters: Sequence[Adapter], pictures: Any, guided: bool = True) -> list[Tensor | None]:
    """Encodes the reference pictures of each adapter as `Adapter.encode` does; None for an adapter without any.

    Raises:
        TypeError, ValueError: there is no adapter, or the pictures are not as `Request.ip_adapter_image` says.
    """
    given = _for_each("ip_adapter_image", pictures, len(adapters))
    return [None if own is None else adapter.encode(own, guided) for adapter, own in zip(adapters, given, strict=True)]


def image_layers(
    adapters: Sequence[Adapter], request: Request, unet: UNet, height: int, width: int, factor: int
) -> list[tuple[KeyValue, ...]]:
    """Computes what every cross-attention is to attend to, negative branch first, and nothing where a scale is 0.

    height and width are the picture's, in pixels; each latent covers `factor` of them along a side.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no adapter for a reference picture.
    """
    num_heads = [attn.num_heads for attn in unet.cross_attentions()]
    layers: list[tuple[KeyValue, ...]] = [()] * len(num_heads)
    if request.ip_adapter_image is None and request.ip_adapter_embeds is None:
        return layers
    if request.ip_adapter_image is not None:
        embeds = encode_pictures(adapters, request.ip_adapter_image, request.guided)
    else:
        embeds = _for_each("ip_adapter_embeds", request.ip_adapter_embeds, len(adapters))
    scale = request.ip_adapter_scale
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * len(adapters)
    scales = _for_each("ip_adapter_scale", scales, len(adapters))
    masks = _for_each("ip_adapter_mask", request.ip_adapter_mask, len(adapters))

    for adapter, own_embeds, own_scales, own_masks in zip(adapters, embeds, scales, masks, strict=True):
        if own_embeds is None:
            continue
        tokens = adapter.tokens(_check_embeds(own_embeds, adapter, request.guided))
        mask_list = None if own_masks is None else read_masks(own_masks, height, width)
        for seen, scale, mask in _views(tokens, _flat(own_scales), mask_list):
            weights = layer_weights(scale, mask, unet, height // factor, width // factor)
            pairs = adapter.model.keys_values(seen, num_heads)
            for i, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
                if weight is not None:
                    key, value = (x.to(unet.conv_in.weight).repeat_interleave(request.num_images, 0) for x in pair)
                    layers[i] = (*layers[i], KeyValue(key, value, weight=weight))
    return layers


def layer_weights(
    scale: float | Mapping[str, Any], mask: Tensor | None, unet: UNet, height: int, width: int
) -> list[float | Tensor | None]:
    """Returns a picture's weight in every cross-attention: scale times mask, or None where the scale is 0."""
    scales = [number or None for number in layer_scales(scale, unet.config)]
    if mask is None:
        return scales
    levels = layer_masks(mask, unet, height, width)
    return [None if number is None else number * level for number, level in zip(scales, levels, strict=True)]


def _views(
    tokens: Tensor, scales: list[Any], masks: list[Tensor] | None
) -> Iterator[tuple[Tensor, Any, Tensor | None]]:
    """Returns what is attended to at a time: all pictures' tokens (B, N T, D), or picture by picture with its mask."""
    num_pictures = tokens.shape[1]
    if len(scales) != 1 and (masks is None or len(scales) != num_pictures):
        raise ValueError(
            f"ip_adapter_scale has {len(scales)} entries for an adapter with {num_pictures} reference pictures; it must"
            " have one, or one for each picture where all have masks"
        )
    if masks is None:
        yield tokens.flatten(1, 2), scales[0], None
        return
    if len(masks) != num_pictures:
        raise ValueError(f"ip_adapter_mask holds {len(masks)} masks, but there are {num_pictures} reference pictures")
    yield from zip(tokens.unbind(1), scales * (num_pictures // len(scales)), masks, strict=True)


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    """Returns the entry of each of `count` adapters; for a single adapter the whole value is its entry."""
    if count == 0:
        raise ValueError(f"{name} is given, but no IP-Adapter is loaded; load one with load_ip_adapter")
    if value is None:
        return [None] * count
    if count == 1:
        return [value]
    if not isinstance(value, list | tuple) or len(value) != count:
        found = f"{len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be a list of {count}, an entry for each IP-Adapter loaded, not {found}")
    return list(value)


def _check_embeds(embeds: Any, adapter: Adapter, guided: bool) -> Tensor:
    """Returns the rows (B, N, L, D) of encoded pictures that a request needs: both branches, or the pictures' alone."""
    given = _flat(embeds)
    if len(given) != 1 or not isinstance(given[0], Tensor):
        kinds = ", ".join(type(one).__name__ for one in given)
        raise TypeError(
            f"ip_adapter_embeds must hold one tensor for each IP-Adapter, as encode_image gives, not {kinds}"
        )
    embeds = given[0]
    dim, rows = adapter.model.config.image_dim, (2,) if guided else (1, 2)
    if embeds.ndim != 4 or embeds.shape[0] not in rows or embeds.shape[3] != dim or embeds.numel() == 0:
        raise ValueError(
            f"ip_adapter_embeds has the shape {tuple(embeds.shape)}; it must be (2, N, L, {dim}), as encode_image gives"
        )
    check_finite(embeds, "ip_adapter_embeds")
    return embeds if guided else embeds[-1:]


def _flat(value: Any) -> list[Any]:
    return [one for item in value for one in _flat(item)] if isinstance(value, list | tuple) else [value]
