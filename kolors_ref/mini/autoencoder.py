"""Stage three of training: the autoencoder, on crops at first, then on whole pictures (Rombach et al. 2022)."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..models.vae import VAE
from .data import example
from .scenes import generator, pick
from .world import CANVAS

KL_WEIGHT = 1e-4
"""Of the divergence from a standard normal, the mean over latents, beside the mean error of pixels in [-1, 1]."""
CROP = 48
"""Pixels along one side of a crop: around a thing, since most of a picture is background and soon learnt."""


class AutoencoderLoss(nn.Module):
    """The autoencoder with its loss: absolute and squared error, and a little Kullback-Leibler divergence."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = VAE(config)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Gives the loss for pictures (B, 3, H, W) in [-1, 1] and unit noise (B, 4, H/8, W/8)."""
        posterior = self.vae.encode(pixels)
        error = self.vae.decode(posterior.sample(noise)).float() - pixels
        scale = self.vae.config.scaling_factor
        mean, std = posterior.mean.float() / scale, posterior.std.float() / scale
        divergence = 0.5 * (mean.square() + std.square() - 1) - std.log()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * divergence.mean()


def picture_batches(seed: int, config: VAEConfig, crop: int = CANVAS) -> Callable[[range], tuple[Tensor, Tensor]]:
    """Gives the function that makes pictures, or square crops of them, and noise from the numbers of examples."""

    def batch(numbers: range) -> tuple[Tensor, Tensor]:
        """The arguments of `AutoencoderLoss.forward`."""
        pictures, noises = [], []
        for number in numbers:
            rng = generator(seed + 1, number)  # not the stream that the scene comes from
            shown = example(seed, number)
            thing = pick(rng, shown.scene.things)
            top, left = (round(centre + crop * (0.5 * rng.random() - 0.75)) for centre in (thing.y, thing.x))
            top, left = (min(max(edge, 0), CANVAS - crop) for edge in (top, left))
            pictures.append(np.asarray(shown.image)[top : top + crop, left : left + crop])
            noises.append(unit_noise(seed, number, (config.latent_channels, *[crop // config.downscale] * 2)))
        return pixels(np.stack(pictures)), torch.stack(noises)

    return batch


def pixels(pictures: np.ndarray) -> Tensor:
    """Bytes (B, H, W, 3) as a tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def unit_noise(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise that the seed and the number of an example decide."""
    return torch.randn(shape, generator=torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32))


@torch.no_grad()
def measured_scale(vae: VAE, seed: int, device: torch.device, count: int = 256) -> float:
    """The factor that gives latents a standard deviation of 1, from the first pictures of a seed."""
    means = [vae.encode(batch.to(device)).mean.float() for batch in whole_pictures(seed, count)]
    return vae.config.scaling_factor / torch.cat(means).std().item()


def whole_pictures(seed: int, count: int, batch_size: int = 32) -> Iterator[Tensor]:
    """The first pictures of a seed, (B, 3, 128, 128) in [-1, 1] each time."""
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        yield pixels(np.stack([np.asarray(example(seed, number).image) for number in numbers]))
