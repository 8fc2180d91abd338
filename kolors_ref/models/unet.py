"""Kolors' denoiser: the UNet of SDXL (Podell et al. 2023, section 2.1) behind a projection of the GLM's embeddings.

Whatever does not depend on the timestep is computed once, by `UNet.prepare`, into a `Context`: the size and pooled
conditioning, and the keys and values of every cross-attention. The denoising loop then calls `UNet.forward` alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import UNetConfig

# ---------------------------------------------------------------------------------------------------------------------
# Conditioning
# ---------------------------------------------------------------------------------------------------------------------


class KeyValue(NamedTuple):
    """Something a cross-attention attends to: H heads of keys and values for L positions.

    Attributes:
        key, value: (B, H, L, C).
        bias: (B, 1, 1, L), added to the attention scores.
        weight: of the attention's result in the sum over several: a number, or (B, 1, N, 1) over the N pixels; 1 if
            None.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    weight: float | Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Everything the UNet is conditioned on, except the timestep.

    Attributes:
        embedding: (B, 4 C) for C channels at the first level: pooled text and size conditioning, added to the
            timestep's embedding.
        layers: for every cross-attention, in order of execution, what it looks at: the text first.
    """

    embedding: Tensor
    layers: tuple[tuple[KeyValue, ...], ...]

    def add(self, layers: Sequence[Sequence[KeyValue]]) -> "Context":
        """Lets each cross-attention look at further things, such as image prompts; none, one or several."""
        return replace(self, layers=tuple((*old, *new) for old, new in zip(self.layers, layers, strict=True)))

    def repeat(self, count: int) -> "Context":
        """Repeats each row of the batch, for several pictures of a prompt; only before `add` brings shared rows."""
        repeat = lambda part: part.repeat_interleave(count, dim=0) if isinstance(part, Tensor) else part
        layers = tuple(tuple(KeyValue(*map(repeat, seen)) for seen in layer) for layer in self.layers)
        return Context(repeat(self.embedding), layers)

    def __getitem__(self, rows: slice) -> "Context":
        """Selects rows of the batch, such as the positive half; copies nothing."""
        return Context(self.embedding[rows], select(self.layers, rows))


def select(layers: Sequence[Sequence[KeyValue]], rows: slice | list[int]) -> tuple[tuple[KeyValue, ...], ...]:
    """Selects rows of the batch of what cross-attentions look at; a tensor of one row is shared by all."""
    take = lambda part: part[rows] if isinstance(part, Tensor) and len(part) > 1 else part
    return tuple(tuple(KeyValue(*map(take, seen)) for seen in layer) for layer in layers)


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Embeds numbers (...,) as (..., dim) cosines, then sines, in float32 (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embedder(in_dim: int, dim: int) -> nn.Sequential:
    """Builds the two-layer network behind the timestep's and the sizes' sinusoids."""
    return nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm and SiLU, (B, C, h, w); in place unless a gradient is required, since new memory costs time."""
    y = norm(x)
    return F.silu(y, inplace=not y.requires_grad)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut; the timestep's embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps x (B, C, h, w) and the activated embedding (B, E) to (B, C', h, w)."""
        h = self.conv1(normalise(self.norm1, x))
        h += self.time_proj(embedding)[:, :, None, None]
        return self.conv2(normalise(self.norm2, h)).add_(self.skip(x))


class Upsample(nn.Conv2d):
    """Copies each pixel to 2 x 2 and convolves the result, with about 4/9 of the arithmetic that this suggests.

    A 3 x 3 window there holds only 2 x 2 different pixels. Taps that meet copies of one pixel are summed first,
    differently for each of a pixel's four copies; then four convolutions of the small feature map, with 2 x 2 taps,
    give the four interleaved parts of the large one (sub-pixel convolution, Shi et al. 2016).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps x (B, C, h, w) to (B, C, 2h, 2w), or one pixel less along a side where `size` is odd."""
        if size != (2 * x.shape[2], 2 * x.shape[3]):
            return super().forward(self.enlarge(x, size))
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for bottom in (0, 1):
            rows = merge(self.weight.permute(0, 2, 3, 1), bottom, dim=1)
            for right in (0, 1):
                weight = merge(rows, right, dim=2).permute(0, 3, 1, 2)
                pairs = F.conv2d(x, weight, self.bias, padding=1)  # of pixels: (B, C, h + 1, w + 1)
                y[..., bottom::2, right::2] = pairs[..., bottom : bottom + x.shape[2], right : right + x.shape[3]]
        return y

    def enlarge(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns what is convolved in effect: x (B, C, h, w) with its pixels copied, (B, C, *size)."""
        return F.interpolate(x, size=size)


def merge(taps: Tensor, second: int, dim: int) -> Tensor:
    """Adds up the two of three taps that meet copies of one pixel, seen from its first copy or its second."""
    before, here, after = taps.unbind(dim)
    return torch.stack([before + here, after] if second else [before, here + after], dim)


class Attention(nn.Module):
    """Multi-head attention without biases on queries, keys and values (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(context_dim, dim, bias=False)
        self.v = nn.Linear(context_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, context: Tensor, bias: Tensor | None = None) -> KeyValue:
        """Projects what is attended to, (B, L, D), to keys and values."""
        k, v = (rearrange(proj(context), "b l (h c) -> b h l c", h=self.num_heads) for proj in (self.k, self.v))
        return KeyValue(k, v, bias)

    def forward(self, x: Tensor, context: Sequence[KeyValue]) -> Tensor:
        """Lets x (B, N, C) attend to each part of the context and sums the results (IP-Adapter, eq. 5)."""
        q = rearrange(self.q(x), "b n (h c) -> b h n c", h=self.num_heads)
        seen = []
        for key, value, bias, weight in context:
            y = F.scaled_dot_product_attention(q, key, value, attn_mask=bias)
            seen.append(y if weight is None else weight * y)
        return self.out(rearrange(sum(seen[1:], seen[0]), "b h n c -> b n (h c)"))


class GEGLU(nn.Module):
    """The first half times the GELU of the second (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., 2 C) to (..., C)."""
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and a feed-forward network, each with a residual connection."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 8 * dim), GEGLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Sequence[KeyValue]) -> Tensor:
        """Maps x (B, N, C) to (B, N, C), attending to context."""
        y = self.norm1(x)
        x = self.self_attn(y, [self.self_attn.keys_values(y)]).add_(x)
        x = self.cross_attn(self.norm2(x), context).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, section 3.3)."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, layers: Iterator[Sequence[KeyValue]]) -> Tensor:
        """Maps x (B, C, h, w) to (B, C, h, w); every block takes its context from layers."""
        y = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            y = block(y, next(layers))
        return rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=x.shape[2]).add_(x)


# ---------------------------------------------------------------------------------------------------------------------
# Levels
# ---------------------------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by a transformer where the level has any.

    A level is a row of layers: `res[j]`, then `attn[j]`. `channels_in` gives the input channels of every residual
    block; `depth` 0 is a level without attention; `attn` may be shorter than `res` (the middle block ends on a residual
    block).
    """

    def __init__(
        self, config: UNetConfig, level: int, channels_in: Sequence[int], depth: int, num_attn: int | None = None
    ) -> None:
        super().__init__()
        channels, embed_dim = config.channels[level], 4 * config.channels[0]
        self.res = nn.ModuleList(ResBlock(c, channels, embed_dim, config.norm_groups) for c in channels_in)
        num_attn = 0 if depth == 0 else len(channels_in) if num_attn is None else num_attn
        self.attn = nn.ModuleList(
            SpatialTransformer(channels, config.cross_attention_dim, config.num_heads[level], depth, config.norm_groups)
            for _ in range(num_attn)
        )

    def layer(self, j: int, x: Tensor, embedding: Tensor, layers: Iterator[Sequence[KeyValue]]) -> Tensor:
        """Applies residual block j and its transformer to x (B, C, h, w)."""
        x = self.res[j](x, embedding)
        return self.attn[j](x, layers) if j < len(self.attn) else x


def down_levels(config: UNetConfig) -> Iterator[Level]:
    """Builds the levels on the way down; all but the last end with a convolution of stride 2."""
    last = len(config.channels) - 1
    for i, channels in enumerate(config.channels):
        first = config.channels[max(i - 1, 0)]
        channels_in = [first] + [channels] * (config.layers_per_block - 1)
        level = Level(config, i, channels_in, config.transformer_depth[i])
        if i < last:
            level.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        yield level


def up_levels(config: UNetConfig) -> Iterator[Level]:
    """Builds the levels on the way up; every residual block also takes the output of one on the way down."""
    skips = [config.channels[0]]
    for i, channels in enumerate(config.channels):
        skips += [channels] * (config.layers_per_block + (i < len(config.channels) - 1))
    x = config.channels[-1]
    for i in reversed(range(len(config.channels))):
        channels_in = []
        for _ in range(config.layers_per_block + 1):
            channels_in.append(x + skips.pop())
            x = config.channels[i]
        level = Level(config, i, channels_in, config.transformer_depth[i])
        if i > 0:
            level.upsample = Upsample(x)
        yield level


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Predicts the noise in latents, given the timestep, the text and the sizes.

    A layer's output is often modified in place: a hook that keeps it must clone it.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, embed_dim = config.channels[0], 4 * config.channels[0]
        self.time_embed = embedder(channels, embed_dim)
        self.size_embed = embedder(config.pooled_dim + 6 * config.size_embed_dim, embed_dim)
        self.text_proj = nn.Linear(config.text_dim, config.cross_attention_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(down_levels(config))
        last = len(config.channels) - 1
        self.mid = Level(config, last, [config.channels[-1]] * 2, config.transformer_depth[-1], num_attn=1)
        self.up = nn.ModuleList(up_levels(config))
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def cross_attentions(self) -> list[Attention]:
        """Lists the cross-attentions in order of execution: down, middle, up."""
        parts = [*self.down, self.mid, *self.up]
        return [block.cross_attn for part in parts for attn in part.attn for block in attn.blocks]

    def prepare(self, text: Tensor, pooled: Tensor, sizes: Tensor, key_bias: Tensor | None = None) -> Context:
        """Computes all that does not depend on the timestep.

        Args:
            text: the text encoder's sequence embedding, (B, L, text_dim).
            pooled: its pooled embedding, (B, pooled_dim).
            sizes: (B, 6) in pixels: original height and width, top and left of the crop, target height and width
                (Podell et al. 2023, section 2.2). Their sinusoids are of fp32 numbers; diffusers first rounds these
                to the dtype of the text: 1366 becomes 1368 in bf16.
            key_bias: (B, L), added to every cross-attention's scores in the network's dtype; none if None.
        """
        dtype = self.conv_in.weight.dtype
        sizes = sinusoid(sizes, self.config.size_embed_dim).flatten(1)
        embedding = self.size_embed(torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=1))
        text = self.text_proj(text.to(dtype))
        bias = None if key_bias is None else key_bias[:, None, None, :].to(dtype)
        return Context(embedding, tuple((attn.keys_values(text, bias),) for attn in self.cross_attentions()))

    def forward(self, latents: Tensor, timestep: Tensor | float, context: Context) -> Tensor:
        """Predicts the noise.

        Args:
            latents: (B, 4, H/8, W/8), scaled as the sampler says.
            timestep: a number or (B,), from 0 to the schedule's last.
            context: what `prepare` gave, for the same B.

        Returns:
            The noise, (B, 4, H/8, W/8).
        """
        timestep = torch.as_tensor(timestep, device=latents.device)
        embedding = self.time_embed(sinusoid(timestep, self.config.channels[0]).to(latents.dtype)) + context.embedding
        embedding = F.silu(embedding)
        layers = iter(context.layers)

        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level in self.down:
            for j in range(len(level.res)):
                x = level.layer(j, x, embedding, layers)
                skips.append(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
                skips.append(x)

        for j in range(len(self.mid.res)):
            x = self.mid.layer(j, x, embedding, layers)

        for level in self.up:
            for j in range(len(level.res)):
                x = level.layer(j, torch.cat([x, skips.pop()], dim=1), embedding, layers)
            if hasattr(level, "upsample"):
                x = level.upsample(x, skips[-1].shape[-2:])
        return self.conv_out(normalise(self.norm_out, x))
