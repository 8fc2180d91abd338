"""How a network that predicts noise is turned into a picture: the samplers, each a small frozen class of settings.

A sampler lays out a `Plan`, noises a picture to the level where a plan begins, and runs the plan as a generator of
`Step`s. It keeps nothing between calls: what a multistep method remembers is a local variable of its `run`.

The Euler family works on x = x0 + sigma * noise and shows the network x / sqrt(sigma^2 + 1); DDIM and DPM-Solver++
(in dpm_solver.py) work on the variance-preserving x that the network expects. Where sigma ends at 0 the two agree.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kolors_ref.sampling.dpm_solver import DPMSolverPP, DPMSolverPPSingle, EDMDPMSolverPP
from kolors_ref.sampling.protocol import DrawNoise, Predict, Sampler, Step, Values, check_choice, check_request
from kolors_ref.sampling.schedule import (
    NoiseSchedule,
    Plan,
    as_numbers,
    at_least_fp32,
    edm_level,
    karras_sigmas,
    vp_level,
)

# ---------------------------------------------------------------------------------------------------------------------
# Euler family: Karras et al. 2022


@dataclass(frozen=True)
class Euler:
    """Euler's method on dx/dsigma (Karras et al. 2022, algorithm 1 without its correction).

    karras: use `karras_sigmas` between the first and last levels that the run would otherwise have.
    """

    karras: bool = False

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes, without `karras`, timesteps, or sigmas of which the last may be 0."""
        check_request(self, num_steps, timesteps, sigmas, takes="timesteps, sigmas")
        if sigmas is not None:
            levels = check_sigmas(sigmas)
            visited = schedule.timestep_at(levels[:-1])
        else:
            visited = (
                schedule.spaced_timesteps(num_steps) if timesteps is None else schedule.custom_timesteps(timesteps)
            )
            visited = visited.astype(np.float32)
            levels = schedule.sigma_at(visited)
            if self.karras:
                levels = karras_sigmas(levels[-1], levels[0], len(levels))
                visited = schedule.timestep_at(levels)
            levels = np.append(levels, 0.0)
        levels = torch.tensor(levels, dtype=torch.float32)
        # "leading" stops short of the last timestep: the latents there still hold a picture, taken to have variance 1.
        variance = levels[0] ** 2 + (schedule.config.timestep_spacing == "leading")
        return Plan(torch.tensor(visited, dtype=torch.float32), levels, variance.sqrt().item())

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """latents + sigma * noise."""
        return edm_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`."""
        x, sigmas = at_least_fp32(latents), plan.sigmas.tolist()
        for i in range(plan.begin, plan.num_steps):
            sigma, sigma_next = sigmas[i : i + 2]
            d = predict_noise(predict, x, plan.timesteps[i], sigma)
            denoised = x - sigma * d
            x = x + (sigma_next - sigma) * d
            yield Step(i, plan.timesteps[i], sigma, x, d, denoised)


@dataclass(frozen=True)
class EulerAncestral:
    """Euler's method to a level below the next one, and fresh noise back up to it (k-diffusion's "Euler a")."""

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes a number of steps only."""
        check_request(self, num_steps, timesteps, sigmas)
        return Euler().plan(schedule, num_steps)

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """latents + sigma * noise."""
        return edm_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; draws noise once per step, after the prediction; the last step's is multiplied by 0."""
        x, sigmas = at_least_fp32(latents), plan.sigmas.tolist()
        for i in range(plan.begin, plan.num_steps):
            sigma, sigma_next = sigmas[i : i + 2]
            sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
            sigma_down = sigma_next**2 / sigma  # so that sigma_down^2 + sigma_up^2 = sigma_next^2
            d = predict_noise(predict, x, plan.timesteps[i], sigma)
            denoised = x - sigma * d
            x = x + (sigma_down - sigma) * d + sigma_up * draw_noise().to(x)
            yield Step(i, plan.timesteps[i], sigma, x, d, denoised)


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two predictions per step, one in the last."""

    karras: bool = False

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes timesteps (without `karras`)."""
        check_request(self, num_steps, timesteps, sigmas, takes="timesteps")
        return Euler(self.karras).plan(schedule, num_steps, timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """latents + sigma * noise."""
        return edm_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; `noise_pred` and `denoised` are of the first of a step's two predictions."""
        x, sigmas = at_least_fp32(latents), plan.sigmas.tolist()
        for i in range(plan.begin, plan.num_steps):
            sigma, sigma_next = sigmas[i : i + 2]
            d = slope = predict_noise(predict, x, plan.timesteps[i], sigma)
            denoised = x - sigma * d
            if sigma_next > 0:
                d_next = predict_noise(predict, x + (sigma_next - sigma) * d, plan.timesteps[i + 1], sigma_next)
                slope = (d + d_next) / 2
            x = x + (sigma_next - sigma) * slope
            yield Step(i, plan.timesteps[i], sigma, x, d, denoised)


def predict_noise(predict: Predict, x: Tensor, timestep: Tensor, sigma: float) -> Tensor:
    """The noise in x = x0 + sigma * noise, which is dx/dsigma; the network is shown x at variance 1."""
    return predict(x / math.sqrt(sigma**2 + 1), timestep).to(x)


def check_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    """Custom noise levels (n + 1,) in fp32; ValueError unless they descend, to 0 or above."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large for fp32 is refused below
        values = as_numbers("custom sigmas", sigmas).astype(np.float32)
        falling = values.ndim == 1 and len(values) > 1 and (np.diff(values) < 0).all()
    if not falling or values[-1] < 0 or not np.isfinite(values[0]):
        raise ValueError("custom sigmas must be two or more numbers, finite, each below the one before, none below 0.")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# DDIM


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    eta in [0, 1] goes from the deterministic sampler to DDPM's ancestral one. final_sigmas_type: "sigma_min" ends at
    the level of timestep 0, as latent diffusion does and Kolors' files say (`set_alpha_to_one: false`), "zero" at 0.
    Each step ends at the next timestep of the plan, in every spacing.
    """

    eta: float = 0.0
    final_sigmas_type: str = "sigma_min"

    def __post_init__(self) -> None:
        check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM's eta is {self.eta}, but must lie in [0, 1].")

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes a number of steps only."""
        check_request(self, num_steps, timesteps, sigmas)
        visited = schedule.spaced_timesteps(num_steps).round()
        final = schedule.sigmas[0].item() if self.final_sigmas_type == "sigma_min" else 0.0
        levels = np.append(schedule.sigma_at(visited), final)
        return Plan(torch.tensor(visited, dtype=torch.int64), torch.tensor(levels, dtype=torch.float32), 1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """alpha * latents + alpha * sigma * noise."""
        return vp_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; draws noise once a step, after the prediction, if eta > 0."""
        x, sigmas = at_least_fp32(latents), plan.sigmas.tolist()
        for i in range(plan.begin, plan.num_steps):
            now, then = vp_level(sigmas[i]), vp_level(sigmas[i + 1])
            noise_pred = predict(x, plan.timesteps[i]).to(x)
            std = self.eta * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)
            denoised = now.denoise(x, noise_pred)
            x = then.alpha * denoised + math.sqrt(then.sigma**2 - std**2) * noise_pred
            if self.eta > 0:
                x = x + std * draw_noise().to(x)
            yield Step(i, plan.timesteps[i], sigmas[i], x, noise_pred, denoised)


# ---------------------------------------------------------------------------------------------------------------------
# By name

SAMPLERS: dict[str, Sampler] = {
    "euler": Euler(),
    "euler-karras": Euler(karras=True),
    "euler-ancestral": EulerAncestral(),
    "heun": Heun(),
    "heun-karras": Heun(karras=True),
    "ddim": DDIM(),
    "dpmpp-2m": DPMSolverPP(),
    "dpmpp-2m-karras": DPMSolverPP(karras=True),
    "dpmpp-2m-sde": DPMSolverPP(stochastic=True),
    "dpmpp-2m-sde-karras": DPMSolverPP(stochastic=True, karras=True),
    "dpmpp-3m": DPMSolverPP(order=3),
    "dpmpp-3m-karras": DPMSolverPP(order=3, karras=True),
    "dpmpp-2s": DPMSolverPPSingle(),
    "dpmpp-2s-karras": DPMSolverPPSingle(karras=True),
    "edm-dpmpp-2m": EDMDPMSolverPP(),
}


def get_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name in `SAMPLERS`, or the one given.

    Raises ValueError for a name that is not there, TypeError for anything that is neither a name nor a sampler.
    """
    if isinstance(sampler, str):
        if sampler in SAMPLERS:
            return SAMPLERS[sampler]
        nearest = difflib.get_close_matches(sampler.lower(), SAMPLERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no sampler {sampler!r}; the nearest is {nearest!r}, of {', '.join(SAMPLERS)}.")
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):
        raise TypeError(f"a sampler must be a name or an instance such as Euler(), but is {sampler!r}.")
    return sampler
