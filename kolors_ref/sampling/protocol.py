"""What a sampler is: the methods it has, what it is given, what it yields."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from kolors_ref.sampling.schedule import NoiseSchedule, Plan

Predict = Callable[[Tensor, Tensor], Tensor]
"""(model_input, timestep) -> noise_pred: latents scaled for the network (B, C, H, W), a timestep (), noise.

It records gradients where they are enabled, for gradient-guided samplers.
"""
DrawNoise = Callable[[], Tensor]
"""() -> unit noise of the latents' shape."""
Values = Sequence[float] | None


@dataclass(frozen=True, eq=False)
class Step:
    """What one step of a run leaves behind.

    index counts in the plan; timestep (), sigma, noise_pred and denoised belong to the level the step started from,
    latents to the one it reached. latents are fp32 where the run was started in half precision.

    sigma is the ratio of noise to signal everywhere, but latents are scaled as the sampler has them: clean latents plus
    sigma times noise in the Euler family and EDM, that divided by sqrt(sigma^2 + 1) in the others. denoised is what
    latents would be without the noise that was predicted: decode it to see the picture so far. noise_pred is what the
    network gave, in EDM only a part of that noise. denoised is None if a sampler does not give it.
    """

    index: int
    timestep: Tensor
    sigma: float
    latents: Tensor
    noise_pred: Tensor
    denoised: Tensor | None = None


@runtime_checkable
class Sampler(Protocol):
    """What the denoising loop asks of a sampler."""

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """The run of `num_steps` steps, or through the caller's timesteps (n,) or sigmas (n + 1,) where taken.

        Raises ValueError unless exactly one of the three is given, is one that this sampler takes, and is in range.
        """

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """Clean latents (B, C, H, W) and unit noise mixed to the level at which `plan` begins."""

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """The steps of `plan`, from latents (B, C, H, W) at its first level; deterministic samplers draw no noise."""


def check_request(sampler: Sampler, num_steps: int | None, timesteps: Values, sigmas: Values, takes: str = "") -> None:
    """ValueError unless exactly one of the three was given, and it is a number of steps or named in `takes`."""
    name = type(sampler).__name__
    if sum(value is not None for value in (num_steps, timesteps, sigmas)) != 1:
        raise ValueError(f"{name} needs exactly one of a number of steps, custom timesteps and custom sigmas.")
    if timesteps is not None and "timesteps" not in takes:
        able = "Euler, Heun, DPMSolverPP and DPMSolverPPSingle do"
        raise ValueError(f"{name} does not take custom timesteps, but {able}.")
    if sigmas is not None and "sigmas" not in takes:
        raise ValueError(f"{name} does not take custom sigmas, but Euler does.")
    if num_steps is None and getattr(sampler, "karras", False):
        raise ValueError(f"{name} with Karras sigmas takes no custom ones and no custom timesteps; set karras=False.")


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of the choices for `field`."""
    if value not in choices:
        raise ValueError(f"{field} is {value!r}, but must be one of {tuple(choices)}.")
