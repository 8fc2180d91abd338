"""The noise schedule of training, and the plan of a sampling run: which timesteps are visited, at which noise levels.

A noise level is written as sigma, the ratio of noise to signal (Karras et al. 2022); how x is scaled is a matter of
the frame, see `Level`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kolors_ref.config import ScheduleConfig

MOST_TIMESTEPS = 100_000
"""The longest schedule, since a table of its levels is kept in memory."""
SPACINGS = ("leading", "linspace", "trailing")

Ramp = TypeVar("Ramp", np.ndarray, Tensor)


@dataclass(frozen=True, eq=False)
class Plan:
    """One sampling run, laid out before it starts.

    timesteps (n,): what the network is told, never rising; sigmas (n + 1,) fp32: the noise level before each step, and
    after the last; initial_scale: what unit noise is multiplied by to start from; begin: the first step to run.
    """

    timesteps: Tensor
    sigmas: Tensor
    initial_scale: float
    begin: int = 0

    @property
    def num_steps(self) -> int:
        """n, the steps of the whole plan; those before `begin` are counted but not run."""
        return len(self.timesteps)

    @property
    def first_sigma(self) -> float:
        """The noise level at which the run begins."""
        return self.sigmas[self.begin].item()

    def from_step(self, begin: int) -> "Plan":
        """The same plan entered at step `begin` of 0 ... n - 1, as image-to-image does; ValueError outside these."""
        if not 0 <= begin < self.num_steps:
            raise ValueError(f"the plan cannot begin at step {begin}: its steps are 0 to {self.num_steps - 1}.")
        return replace(self, begin=begin)


class Level(NamedTuple):
    """A noise level in some frame: x = alpha * x0 + sigma * noise, and lam = log(alpha / sigma), half the log-SNR.

    This sigma multiplies the noise of the frame's own x: in `vp_level` it is alpha times the ratio that is called sigma
    elsewhere.
    """

    alpha: float
    sigma: float
    lam: float

    def mix(self, clean: Tensor, noise: Tensor) -> Tensor:
        """x, fp32 at least, from clean latents and unit noise of their shape."""
        clean = at_least_fp32(clean)
        return self.alpha * clean + self.sigma * noise.to(clean)

    def denoise(self, x: Tensor, noise_pred: Tensor) -> Tensor:
        """The clean latents that x would be made of if `noise_pred` were its noise."""
        return (x - self.sigma * noise_pred) / self.alpha


def vp_level(sigma: float) -> Level:
    """The level in the variance-preserving frame, alpha^2 + sigma^2 = 1, in which the network was trained."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return Level(alpha, sigma * alpha, -math.log(sigma) if sigma > 0 else math.inf)


def edm_level(sigma: float) -> Level:
    """The level in the frame of Karras et al. 2022: alpha = 1."""
    return Level(1.0, sigma, -math.log(sigma) if sigma > 0 else math.inf)


class NoiseSchedule:
    """The levels of noise the network was trained on: betas, alphas_cumprod and sigmas, each (T,) fp32, noisier with t.

    Computed in fp32 throughout, because the network was trained on the fp32 table: more precision would do worse.
    Raises ValueError, naming the field, for a configuration that is not a schedule.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        if not 1 <= config.num_train_timesteps <= MOST_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps is {config.num_train_timesteps}, but must be from 1 to {MOST_TIMESTEPS}."
            )
        if not 0 < config.beta_start <= config.beta_end < 1:
            raise ValueError(
                f"beta_start {config.beta_start} and beta_end {config.beta_end} must lie in (0, 1), in this order."
            )
        if config.steps_offset < 0:
            raise ValueError(f"steps_offset is {config.steps_offset}, but must be 0 or more.")
        if config.timestep_spacing not in SPACINGS:
            raise ValueError(f"timestep_spacing is {config.timestep_spacing!r}, but must be one of {SPACINGS}.")
        self.config = config
        self.betas = compute_betas(config)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        if self.sigmas[0] == 0:
            raise ValueError(f"beta_start is {config.beta_start}, which is no noise at all in fp32.")
        if not torch.isfinite(self.sigmas[-1]):
            raise ValueError(
                f"beta_end {config.beta_end} leaves nothing but noise after {config.num_train_timesteps} timesteps."
            )

    def sigma_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Noise levels (n,) at `timesteps` (n,), linear between the whole ones."""
        return np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas.numpy())

    def timestep_at(self, sigmas: np.ndarray) -> np.ndarray:
        """Timesteps (n,), not always whole, at noise levels (n,): linear in log sigma, 0 or T - 1 beyond the table."""
        return np.interp(np.log(sigmas), np.log(self.sigmas.numpy()), np.arange(len(self.sigmas)))

    def spaced_timesteps(self, num_steps: int, spacing: str | None = None, with_end: bool = False) -> np.ndarray:
        """`num_steps` timesteps (n,), descending, fp64 and not always whole (spacings: Lin et al. 2023, table 2).

        `spacing` is the configuration's unless given. `with_end` divides the range into n steps rather than n points:
        the least noisy point is then the end of the last step and not itself visited ("trailing" is always so).
        Raises ValueError if num_steps is not a whole number, below 1, or more than the spacing can tell apart.
        """
        self.check_num_steps(num_steps)
        n, total = num_steps, self.config.num_train_timesteps
        spacing = spacing or self.config.timestep_spacing
        points = n + (with_end and spacing != "trailing")
        if spacing == "leading":
            timesteps = (np.arange(points) * (total // points))[::-1][:n] + float(self.config.steps_offset)
        elif spacing == "linspace":
            timesteps = np.linspace(0, total - 1, points)[::-1][:n]
        else:
            timesteps = np.arange(total, 0, -total / n)[:n].round() - 1  # rounding may give arange one element too many
        if points > total or timesteps[0] > total - 1:
            raise ValueError(f"{n} steps are too many for {spacing!r} spacing of {total} training timesteps.")
        return timesteps

    def custom_timesteps(self, timesteps: Sequence[float]) -> np.ndarray:
        """The caller's own timesteps (n,) as fp64; ValueError unless they descend and lie within the training range."""
        values, last = as_numbers("custom timesteps", timesteps), self.config.num_train_timesteps - 1
        if values.ndim != 1 or not len(values) or not (np.diff(values) < 0).all():
            raise ValueError("custom timesteps must be a list of numbers, each smaller than the one before.")
        if not (values[0] <= last and values[-1] >= 0):
            raise ValueError(f"custom timesteps must lie in 0 to {last}, but run from {values[0]:g} to {values[-1]:g}.")
        return values

    def check_num_steps(self, num_steps: int) -> None:
        """ValueError unless `num_steps` is a whole number from 1 to the number of training timesteps."""
        total = self.config.num_train_timesteps
        if not isinstance(num_steps, Integral) or not 1 <= num_steps <= total:
            raise ValueError(f"the number of steps is {num_steps!r}, but must be a whole number from 1 to {total}.")


def compute_betas(config: ScheduleConfig) -> Tensor:
    """The variances (T,) added at each training timestep, fp32; ValueError for a beta_schedule that is not known."""
    start, end, total = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "linear":  # Ho et al. 2020
        return torch.linspace(start, end, total, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":  # linear in sqrt(beta): latent diffusion, Rombach et al. 2022
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    raise ValueError(f"beta_schedule is {config.beta_schedule!r}, but must be 'scaled_linear' or 'linear'.")


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> np.ndarray:
    """n noise levels (n,) from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho): Karras et al. 2022, eq. 5.

    The higher rho, the more of them lie near sigma_min; n = 1 gives sigma_max alone.
    """
    return karras_levels(sigma_min, sigma_max, np.linspace(0, 1, n), rho)


def karras_levels(sigma_min: float, sigma_max: float, ramp: Ramp, rho: float) -> Ramp:
    """The formula behind `karras_sigmas`, in the dtype of `ramp` (n,), which runs from 0 to 1."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def as_numbers(name: str, values: Sequence[float]) -> np.ndarray:
    """The values as fp64; ValueError, with the name, if they are not numbers."""
    try:
        numbers = np.asarray(values)
        if numbers.dtype.kind in "US":
            raise ValueError("some are text")
        return numbers.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of numbers, but {error}.") from None


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in fp32 if it was in half precision, where the small steps of a sampler would be rounded away."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
