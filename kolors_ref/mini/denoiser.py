"""Stage four of training: the UNet, on latents that were computed before (Kolors report, section 2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..config import UNetConfig
from ..models.glm import GLMEncoder
from ..models.unet import UNet
from ..models.vae import VAE
from ..sampling import NoiseSchedule
from ..text_layout import packed_layout
from ..tokenizer import Tokenizer
from .autoencoder import pixels, unit_noise
from .captions import LANGUAGES, word
from .claims import choose_claim
from .data import example
from .processes import Processes
from .scenes import generator, pick
from .training_state import read_result, write_tensors
from .world import CANVAS, Scene

NO_CAPTION = 0.1
"""The share of examples without a caption, for classifier-free guidance (Ho and Salimans 2022)."""
SMALL = 0.1
"""The share of pictures enlarged from half their size, which the size condition tells (Podell et al. 2023, 2.2)."""
SNR_LIMIT = 5.0
"""The signal-to-noise ratio beyond which a level counts less (min-SNR, Hang et al. 2023)."""
EVEN_VARIANCE = 10.0
"""The noise variance at about which levels begin to be weighted up.

The error in predicted noise falls as 1 / (10 + variance); with that evened out, all levels count alike (Karras et al.
2022, section 5).
"""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of the golden ratio, modulo 1, are spread evenly: so are the levels of noise of every batch."""
LEVELS = ((0.0, 0.15, 0.9, 1.0), (0.0, 0.35, 0.9, 1.0))
"""Quantiles of the examples, the least noise first, and the fractions of the schedule that they are mapped to.

Three in four have noise 1.1 to 14 times as strong as the latents, the levels that decide the layout; preferring the
middle of the schedule follows Esser et al. 2024, section 3.1.
"""
SHARD = 2048
"""Pictures whose latents are in one file."""


class DenoisingLoss(nn.Module):
    """The UNet with its loss: the weighted squared error of the noise that it predicts."""

    def __init__(self, config: UNetConfig, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.register_buffer("signal", schedule.alphas_cumprod, persistent=False)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        sizes: Tensor,
        text: Tensor,
        pooled: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Returns the loss.

        Args:
            latents, noise: (B, 4, H/8, W/8), both of unit scale.
            timestep: (B,) whole numbers.
            sizes, text, pooled, bias: see `UNet.prepare`.
        """
        noise_pred = self.predict(latents, noise, timestep, sizes, text, pooled, bias)
        return (self.weight(timestep) * (noise_pred - noise).square()).mean()

    def predict(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        sizes: Tensor,
        text: Tensor,
        pooled: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Predicts the noise in latents, mixed with it as the schedule has it; arguments are `forward`'s."""
        context = self.unet.prepare(text, pooled, sizes, bias)
        return self.unet(self.noisy(latents, noise, timestep), timestep, context).float()

    def noisy(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The latents noised to timesteps (B,): mixed with noise as the schedule prescribes."""
        signal = self.signal[timestep][:, None, None, None]
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def weight(self, timestep: Tensor) -> Tensor:
        """The weight of the squared error at timesteps (B,), as (B, 1, 1, 1)."""
        signal = self.signal[timestep][:, None, None, None]
        snr = signal / (1 - signal)
        return (snr.clamp(max=SNR_LIMIT) / snr) * (1 + 1 / (EVEN_VARIANCE * snr))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of the blocks, for Muon: neither what reads the inputs nor what gives the output."""
        blocks = (*self.unet.down, self.unet.mid, *self.unet.up)
        return [parameter for block in blocks for parameter in block.parameters() if parameter.ndim > 1]


@dataclass(frozen=True)
class Latents:
    """The latents of the first pictures of a seed, (N, 4, 16, 16), and whether each was enlarged, (N,)."""

    latents: Tensor
    small: Tensor


@torch.no_grad()
def cache_latents(vae: VAE, folder: Path, name: str, seed: int, count: int, clean: bool, here: Processes) -> Latents:
    """Encodes pictures, each process its share, into files that a later run takes as they are."""
    files = [folder / f"{name}-{start:07d}.safetensors" for start in range(0, count, SHARD)]
    share = list(enumerate(files))[here.rank :: here.count]  # dealt out before anyone looks for files, which come up
    missing = [(number, file) for number, file in share if not file.is_file()]
    for number, file in tqdm(missing, desc=name, unit="file", disable=not here.first):
        numbers = range(number * SHARD, min((number + 1) * SHARD, count))
        small = torch.tensor([not clean and generator(seed + 2, n).random() < SMALL for n in numbers])
        latents = [
            encode(vae, [picture(seed, n, clean, bool(s)) for n, s in part], here)
            for part in split(list(zip(numbers, small, strict=True)), 32)
        ]
        write_tensors(file, {"latents": torch.cat(latents).half(), "small": small})
    here.wait()
    shards = [read_result(file) for file in files]
    return Latents(torch.cat([s["latents"] for s in shards]), torch.cat([s["small"] for s in shards]))


def split(items: list, size: int) -> list[list]:
    """Cuts a list into pieces."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def encode(vae: VAE, pictures: list[np.ndarray], here: Processes) -> Tensor:
    """The latents (B, 4, 16, 16) of pictures."""
    with here.autocast():
        return vae.encode(pixels(np.stack(pictures)).to(here.device)).mode().float().cpu()


def picture(seed: int, number: int, clean: bool, small: bool) -> np.ndarray:
    """A picture as bytes (128, 128, 3); a small one is enlarged from half the size."""
    image = example(seed, number, clean=clean).image
    if small:
        image = image.resize((CANVAS // 2,) * 2, Image.BOX).resize((CANVAS,) * 2, Image.BICUBIC)
    return np.asarray(image)


def denoising_batches(
    cached: Latents,
    seed: int,
    clean: bool,
    dense_share: float,
    num_timesteps: int,
    tokenizer: Tokenizer,
    text_encoder: GLMEncoder,
) -> Callable[[range], tuple[Tensor, ...]]:
    """Returns the function that makes a batch from the numbers of its examples.

    A picture comes again and again, each time with another caption and other noise.
    """
    scene = cache(lambda row: example(seed, row, clean=clean).scene)

    def batch(numbers: range) -> tuple[Tensor, ...]:
        """The arguments of `DenoisingLoss.forward`."""
        rows = [number % len(cached.latents) for number in numbers]
        captions, noises = [], []
        for number, row in zip(numbers, rows, strict=True):
            captions.append(new_caption(scene(row), dense_share, generator(seed + 3, number)))
            noises.append(unit_noise(seed, number, tuple(cached.latents.shape[1:])))
        # Shifted by one every epoch, or each picture would meet the same five levels again and again.
        timestep = draw_timesteps([number + number // len(cached.latents) for number in numbers], num_timesteps)
        sizes = size_conditions(torch.where(cached.small[rows], CANVAS / 2, float(CANVAS)))
        with torch.no_grad():
            text = packed_layout(tokenizer(captions)).encode(text_encoder)
        latents = cached.latents[rows].float()
        return latents, torch.stack(noises), timestep, sizes, text.sequence, text.pooled, text.key_bias

    return batch


def draw_timesteps(numbers: Sequence[int], num_timesteps: int) -> Tensor:
    """The timesteps (B,) for example numbers: consecutive ones are spread over all `LEVELS`, whatever the first is."""
    return torch.tensor([int(np.interp(number * GOLDEN % 1, *LEVELS) * num_timesteps) for number in numbers])


def size_conditions(original: Tensor) -> Tensor:
    """The size conditions (B, 6) of square pictures that were made from this many pixels a side, (B,)."""
    sizes = torch.full((len(original), 6), float(CANVAS))
    sizes[:, 0], sizes[:, 1], sizes[:, 2:4] = original, original, 0.0
    return sizes


def new_caption(scene: Scene, dense_share: float, rng: np.random.Generator) -> str:
    """Draws a caption of a scene; now and then an empty one."""
    empty, dense = rng.random() < NO_CAPTION, rng.random() < dense_share
    language = pick(rng, LANGUAGES)
    return "" if empty else word(choose_claim(scene, rng, dense), rng, language)
