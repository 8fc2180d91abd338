"""The autoencoder between pictures and latents: SDXL's (Podell et al. 2023, section 2.4), after Rombach et al. 2022."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VAEConfig

# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def memory_format(weight: Tensor) -> torch.memory_format:
    """The layout to compute in: channels-last, which convolutions prefer, but not in fp32 or fp64 on a CPU.

    There it gains nothing, and torch's group norm loses digits in it: 1e-4 of the result for a picture of 1024 x 1024.
    """
    exact = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return torch.contiguous_format if exact else torch.channels_last


def normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm and SiLU, (B, C, h, w); in place unless a gradient is required, since a feature map can be 1 GB."""
    y = norm(x)
    return F.silu(y, inplace=not y.requires_grad)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, h, w) to (B, C', h, w)."""
        h = self.conv1(normalise(self.norm1, x))
        return self.conv2(normalise(self.norm2, h)).add_(self.skip(x))


class Upsample(nn.Conv2d):
    """Copies each pixel to 2 x 2 and convolves the result, with 4/9 of the arithmetic that this suggests.

    Both are linear, and together they are a transposed convolution of stride 2. Where a window of 3 x 3 holds several
    copies of a pixel, their taps are added up beforehand.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, h, w) to (B, C, 2h, 2w)."""
        taps = self.weight.permute(1, 2, 3, 0)  # so that the stacked ones are channels-last
        taps = spread(spread(taps, dim=1), dim=2).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(x, taps, self.bias, stride=2, padding=1)
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return y.contiguous(memory_format=layout)


def spread(taps: Tensor, dim: int) -> Tensor:
    """Turns the three taps of a window into the four with which a pixel enters the outputs around its two copies."""
    before, here, after = taps.unbind(dim)
    return torch.stack([after, here + after, before + here, before], dim)


class Attention(nn.Module):
    """Self-attention of one head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, h, w) to (B, C, h, w)."""
        y = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + rearrange(self.out(y), "b 1 (h w) c -> b c h w", h=x.shape[2])  # in the layout of x


class Middle(nn.Module):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(channels, channels, groups) for _ in range(2))
        self.attn = Attention(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, h, w) to (B, C, h, w)."""
        return self.res[1](self.attn(self.res[0](x)))


class Level(nn.Module):
    """Residual blocks of one resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.res = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, h, w) to (B, C', h, w)."""
        for res in self.res:
            x = res(x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# ---------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """From pictures to the mean and log-variance of latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, config.layers_per_block, groups)
            if i < len(channels) - 1:
                level.downsample = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(level)
        self.mid = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, 3, H, W) to (B, 8, H/8, W/8)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(F.pad(x, (0, 1, 0, 1)))  # on the right and at the bottom only
        return self.conv_out(normalise(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """From latents to pictures."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = Middle(channels[0], groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, config.layers_per_block + 1, groups)
            if i < len(channels) - 1:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, 4, H/8, W/8) to (B, 3, H, W)."""
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(normalise(self.norm_out, x))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """The distribution of a picture's latents: a Gaussian with independent components, scaled for the UNet.

    Attributes:
        mean: (B, 4, H/8, W/8), also its mode.
        std: (B, 4, H/8, W/8).
    """

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """Returns the most probable latents, (B, 4, H/8, W/8)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Returns the latents that unit noise (B, 4, H/8, W/8) selects."""
        return self.mean + self.std * noise


class VAE(nn.Module):
    """The autoencoder; it takes and gives latents in the UNet's scale.

    A layer's output is often modified in place: a hook that keeps it must clone it.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Posterior:
        """Encodes pictures (B, 3, H, W) in [-1, 1]; where a side is not a multiple of 8, the remainder is lost."""
        moments = self.quant_conv(self.encoder(self.laid_out(pixels)))
        mean, log_variance = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return Posterior(self.config.scaling_factor * mean, self.config.scaling_factor * std)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, 4, H/8, W/8) to pictures (B, 3, H, W), about in [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(self.laid_out(latents / self.config.scaling_factor)))

    def laid_out(self, x: Tensor) -> Tensor:
        """Returns x (B, C, h, w) in the layout to compute in."""
        return x.contiguous(memory_format=memory_format(self.quant_conv.weight))
