"""The autoencoder at work: fp16 where it suffices, fp32 where it overflows, and large pictures tile by tile."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor

from .models.vae import VAE

TILE = 128
"""Latents along one side of a tile: the 1024 pixels that Kolors was trained for."""
OVERLAP = 32
"""Latents that neighbouring tiles share, at least."""


def without_overflow(vae: VAE, inputs: Iterable[Tensor], work: Callable[[VAE, Tensor], Tensor]) -> list[Tensor]:
    """Returns work(vae, x) for each of the inputs.

    The first result that is not finite in fp16, whose largest number is 65504, is recomputed in fp32, and those after
    it are computed in fp32 only.

    Args:
        inputs: pixels or latents; they are moved to the autoencoder's device and dtype.
        work: an encoding or a decoding.
    """
    results = []
    for x in inputs:
        weight = vae.post_quant_conv.weight
        y = work(vae, x.to(weight))
        if weight.dtype == torch.float16 and not torch.isfinite(y).all():
            vae = deepcopy(vae).float()
            torch.cuda.empty_cache()  # cached blocks of half the size are of no use now
            y = work(vae, x.to(weight.device, torch.float32))
        results.append(y)
    return results


def decode_tiled(vae: VAE, latents: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Decodes latents (B, 4, h, w) to pictures (B, 3, 8 h, 8 w) in overlapping tiles, which are blended linearly.

    An approximation where there are several tiles: group norm and attention see one tile at a time. Apart from the
    picture itself, only one tile's memory is needed.

    Args:
        tile, overlap: in latents, along a side.
    """
    height, width = latents.shape[-2:]
    factor = vae.config.downscale
    tops, lefts = (tile_starts(size, tile, overlap) for size in (height, width))
    if len(tops) == len(lefts) == 1:
        return vae.decode(latents)
    rows, columns = (blend_weights(min(size, tile) * factor, overlap * factor) for size in (height, width))
    dtype = torch.promote_types(latents.dtype, torch.float32)  # to add up in
    weights = (rows[:, None] * columns).to(latents.device, dtype)
    total = torch.zeros(height * factor, width * factor, device=latents.device, dtype=dtype)
    pixels = total.repeat(len(latents), vae.config.in_channels, 1, 1)
    for top in tops:
        for left in lefts:
            window = vae.decode(latents[..., top : top + tile, left : left + tile])
            place = (..., slice(top * factor, (top + tile) * factor), slice(left * factor, (left + tile) * factor))
            pixels[place] += weights * window
            total[place] += weights
    return pixels / total


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Returns where tiles begin that cover `size` latents, evenly spaced and overlapping by `overlap` at least."""
    gaps = max(math.ceil((size - tile) / (tile - overlap)), 0)
    return [round(i * (size - tile) / gaps) for i in range(gaps + 1)] if gaps else [0]


def blend_weights(size: int, overlap: int) -> Tensor:
    """Returns the weights (size,) of a tile's pixels: rising over the overlap from either edge, then 1."""
    position = torch.arange(size) + 0.5
    return torch.minimum(position, size - position).div(max(overlap, 1)).clamp(max=1.0)
