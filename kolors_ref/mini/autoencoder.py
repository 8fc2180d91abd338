"""Stage three of training: the autoencoder, on crops at first, then on whole pictures (Rombach et al. 2022).

Finally the decoder alone is trained to draw small things inside others, which are rare and which it had drawn as dots.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..models.vae import VAE
from .data import example
from .drawing import render
from .processes import Processes
from .scenes import generator, pick, sample_scene
from .world import CANVAS, Scene, related

KL_WEIGHT = 1e-4
"""The weight of the KL divergence from N(0, 1), a mean over latents; the error is one over pixels in [-1, 1]."""
CROP = 48
"""Pixels along one side of a crop: around a thing, since most of a picture is background and soon learnt."""
NESTED = 0.5
"""The share of pictures that are given the nested layout when the decoder is trained alone."""
NEAR, MARGIN = 12.0, 5.0
"""The loss weight of pixels within MARGIN pixels of a thing, where all others weigh 1."""


class AutoencoderLoss(nn.Module):
    """The autoencoder with its loss: absolute and squared error, and a little Kullback-Leibler divergence."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = VAE(config)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Returns the loss for pictures (B, 3, H, W) in [-1, 1] and unit noise (B, 4, H/8, W/8)."""
        posterior = self.vae.encode(pixels)
        error = self.vae.decode(posterior.sample(noise)).float() - pixels
        scale = self.vae.config.scaling_factor
        mean, std = posterior.mean.float() / scale, posterior.std.float() / scale
        divergence = 0.5 * (mean.square() + std.square() - 1) - std.log()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * divergence.mean()


class DecoderLoss(nn.Module):
    """The decoder alone with its loss; the latents, and what has learnt to make them, stay as they are."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            latents: (B, 4, H/8, W/8), not scaled.
            pixels: (B, 3, H, W) in [-1, 1].
            weight: (B, 1, H, W), what each pixel counts.
        """
        error = self.decoder(self.post_quant_conv(latents)).float() - pixels
        return (weight * (error.abs() + error.square())).mean()


def picture_batches(seed: int, config: VAEConfig, crop: int = CANVAS) -> Callable[[range], tuple[Tensor, Tensor]]:
    """Returns the function that makes pictures, or square crops of them, and noise from the numbers of examples."""

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


def decoder_batches(seed: int, vae: VAE, here: Processes) -> Callable[[range], tuple[Tensor, Tensor, Tensor]]:
    """Returns the function that makes latents, whole pictures and weights of pixels from the numbers of examples."""
    size = CANVAS // vae.config.downscale

    @torch.no_grad()
    def batch(numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `DecoderLoss.forward`."""
        scenes, noises = [], []
        for number in numbers:
            rng = generator(seed + 5, number)
            scenes.append(sample_scene(rng, layout="nested" if rng.random() < NESTED else None))
            noises.append(unit_noise(seed + 5, number, (vae.config.latent_channels, size, size)))
        shown = pixels(np.stack([np.asarray(render(scene)) for scene in scenes])).to(here.device)
        with here.autocast():
            latents = vae.encode(shown).sample(torch.stack(noises).to(here.device)).float()
        return latents / vae.config.scaling_factor, shown, torch.stack([nearness(scene) for scene in scenes])

    return batch


def nearness(scene: Scene) -> Tensor:
    """The loss weight of each pixel, (1, 128, 128), with mean 1: higher near a thing, unless it has another inside."""
    weight, axis = torch.ones(1, CANVAS, CANVAS), torch.arange(CANVAS) + 0.5
    for thing in scene.things:
        if not any(related(other, "inside", thing) for other in scene.things if other is not thing):
            across, along = ((axis - centre).abs() < thing.extent / 2 + MARGIN for centre in (thing.x, thing.y))
            weight[:, along[:, None] & across] = NEAR
    return weight / weight.mean()


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
