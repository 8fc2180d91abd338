"""DPM-Solver++ (Lu et al. 2022b): one update for all variants, and the three samplers built on it.

The mathematics does not know how x is scaled: a frame, `vp_level` or `edm_level`, says what each sigma means.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kolors_ref.sampling.protocol import DrawNoise, Predict, Step, Values, check_choice, check_request
from kolors_ref.sampling.schedule import (
    Level,
    NoiseSchedule,
    Plan,
    at_least_fp32,
    edm_level,
    karras_levels,
    karras_sigmas,
    vp_level,
)

# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


def dpm_update(
    x: Tensor, start: Level, end: Level, derivatives: Sequence[Tensor], solver_type: str, noise: Tensor | None = None
) -> Tensor:
    """x carried from level `start` to level `end` by integrating a Taylor polynomial of the denoised picture.

    derivatives: D_k = h^k d^k x0 / d lam^k at `start`, one to three of them, h being the step in lam (proposition 4.1);
    but see `backward_derivatives` for what D_2 really is.
    solver_type: "heun" gives D_1 its exact weight, "midpoint" one equal to second order; with a D_2 it is exact anyway.
    With `noise` this is the step of the diffusion SDE (their SDE-DPM-Solver++), which forgets x twice as fast.
    """
    h = end.lam - start.lam
    if h == 0:  # Karras levels end at sigma_min; a final level of sigma_min then has nothing left to do
        return x
    decay, h = (1.0, h) if noise is None else (math.exp(-h), 2 * h)
    phi = -math.expm1(-h)
    x = end.sigma / start.sigma * decay * x + end.alpha * phi * derivatives[0]
    if len(derivatives) > 1:
        exact = solver_type == "heun" or len(derivatives) > 2
        x = x + end.alpha * (1 - phi / h if exact else phi / 2) * derivatives[1]
    if len(derivatives) > 2:
        x = x + end.alpha * (0.5 - (h - phi) / h**2) * derivatives[2]
    return x if noise is None else x + end.sigma * math.sqrt(phi) * noise


def backward_derivatives(denoised: Sequence[Tensor], lams: Sequence[float], h: float) -> list[Tensor]:
    """The D_k of `dpm_update` at the newest of one to three pictures, newest first, at `lams`: divided differences.

    D_2 is only half of h^2 d^2 x0 / d lam^2, as in the reference implementation, whose numbers ours match; so the
    "third-order" method is of second order.
    """
    derivatives = [denoised[0]]
    if len(denoised) > 1:
        h0 = lams[0] - lams[1]
        newer = (denoised[0] - denoised[1]) * (h / h0)
        derivatives.append(newer)
    if len(denoised) > 2:
        h1 = lams[1] - lams[2]
        change = (newer - (denoised[1] - denoised[2]) * (h / h1)) / (h0 + h1)
        derivatives[1:] = [newer + h0 * change, h * change]
    return derivatives


def multistep(
    settings: "DPMSolverPP | EDMDPMSolverPP",
    frame: Callable[[float], Level],
    denoise: Callable[[Tensor, Tensor, Level], tuple[Tensor, Tensor]],
    latents: Tensor,
    plan: Plan,
    draw_noise: DrawNoise,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (algorithm 2) and its kin of first and third order, on x as `frame` scales it.

    denoise(x, timestep, level) gives the network's output and the denoised picture. The order grows from 1 as pictures
    accumulate, and falls again at the end: in short runs for stability, and because no polynomial reaches lam = inf.
    """
    x, n, sigmas, denoised = at_least_fp32(latents), plan.num_steps, plan.sigmas.tolist(), []
    levels = [frame(sigma) for sigma in sigmas]
    fall = settings.lower_order_final and n < 15
    for i in range(plan.begin, n):
        output, newest = denoise(x, plan.timesteps[i], levels[i])
        denoised = [newest, *denoised[: settings.order - 1]]
        order = len(denoised)
        if i == n - 1 and (fall or settings.euler_at_final or sigmas[n] == 0):
            order = 1
        elif i == n - 2 and fall:
            order = min(order, 2)
        lams = [levels[i - k].lam for k in range(order)]
        derivatives = backward_derivatives(denoised[:order], lams, levels[i + 1].lam - lams[0])
        noise = draw_noise().to(x) if settings.stochastic else None
        x = dpm_update(x, levels[i], levels[i + 1], derivatives, settings.solver_type, noise)
        yield Step(i, plan.timesteps[i], sigmas[i], x, output, newest)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++ multistep (Lu et al. 2022b): order 2 is "2M"; `stochastic` is the SDE variant, of order 1 or 2.

    karras: the levels of `karras_sigmas` over the whole training range, timesteps rounded. solver_type: "midpoint" or
    "heun", see `dpm_update`. lower_order_final: drop to order 2, then 1, at the end of runs of fewer than 15 steps;
    euler_at_final: order 1 in the last step of any run. final_sigmas_type: "zero", or "sigma_min", that of timestep 0.
    """

    order: int = 2
    karras: bool = False
    stochastic: bool = False
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        check_settings(self)

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes whole timesteps (without `karras`)."""
        check_request(self, num_steps, timesteps, sigmas, takes="timesteps")
        final = schedule.sigmas[0].item() if self.final_sigmas_type == "sigma_min" else 0.0
        return whole_plan(schedule, num_steps, timesteps, self.karras, schedule.config.timestep_spacing, final)

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """alpha * latents + alpha * sigma * noise."""
        return vp_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; draws noise once a step, after the prediction, if `stochastic`."""

        def denoise(x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            noise_pred = predict(x, timestep).to(x)
            return noise_pred, level.denoise(x, noise_pred)

        return multistep(self, vp_level, denoise, latents, plan, draw_noise)


@dataclass(frozen=True)
class DPMSolverPPSingle:
    """DPM-Solver++(2S), singlestep (Lu et al. 2022b, algorithm 1), with one prediction per timestep of the plan.

    Steps go in pairs: a first-order one to an intermediate level, then a second-order one from where the pair started.
    The timesteps are spaced "linspace" whatever the schedule says, as diffusers' are.
    """

    karras: bool = False
    solver_type: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("solver_type", self.solver_type, ("midpoint", "heun"))

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes whole timesteps (without `karras`)."""
        check_request(self, num_steps, timesteps, sigmas, takes="timesteps")
        return whole_plan(schedule, num_steps, timesteps, self.karras, "linspace", 0.0)

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """alpha * latents + alpha * sigma * noise."""
        return vp_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; a step of odd index, unless the first or last to run, closes the pair opened before it."""
        x, n, sigmas = at_least_fp32(latents), plan.num_steps, plan.sigmas.tolist()
        levels = [vp_level(sigma) for sigma in sigmas]
        opening = None
        for i in range(plan.begin, n):
            noise_pred = predict(x, plan.timesteps[i]).to(x)
            denoised = levels[i].denoise(x, noise_pred)
            if opening and i % 2 == 1 and i < n - 1:
                x, first = opening
                h = levels[i + 1].lam - levels[i - 1].lam
                slope = (denoised - first) / (levels[i].lam - levels[i - 1].lam)
                x = dpm_update(x, levels[i - 1], levels[i + 1], [first, h * slope], self.solver_type)
            else:
                opening = x, denoised
                x = dpm_update(x, levels[i], levels[i + 1], [denoised], self.solver_type)
            yield Step(i, plan.timesteps[i], sigmas[i], x, noise_pred, denoised)


@dataclass(frozen=True)
class EDMDPMSolverPP:
    """DPM-Solver++ on the levels and preconditioning of Karras et al. 2022 (table 1), whatever the schedule says.

    The network is shown x / sqrt(sigma^2 + sigma_data^2) and the timestep ln(sigma) / 4. These are not the timesteps
    Kolors was trained on: this sampler is here because Kolors' own README names it.
    """

    order: int = 2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    stochastic: bool = False
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min {self.sigma_min} must lie between 0 and a finite sigma_max {self.sigma_max}.")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data is {self.sigma_data}, but must be a finite number above 0.")
        if not 1 <= self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}, but must be a finite number of at least 1.")

    def plan(
        self, schedule: NoiseSchedule, num_steps: int | None = None, timesteps: Values = None, sigmas: Values = None
    ) -> Plan:
        """See `Sampler.plan`; takes a number of steps only."""
        check_request(self, num_steps, timesteps, sigmas)
        schedule.check_num_steps(num_steps)
        # In fp32, as the reference has it: over many stochastic steps the rounding shows.
        levels = karras_levels(self.sigma_min, self.sigma_max, torch.linspace(0, 1, num_steps), self.rho)
        final = min(self.sigma_min, levels[-1].item()) if self.final_sigmas_type == "sigma_min" else 0.0
        levels = torch.cat([levels, torch.tensor([final])])
        return Plan(0.25 * levels[:-1].log(), levels, math.sqrt(self.sigma_max**2 + 1))

    def add_noise(self, latents: Tensor, noise: Tensor, plan: Plan) -> Tensor:
        """latents + sigma * noise."""
        return edm_level(plan.first_sigma).mix(latents, noise)

    def run(self, predict: Predict, latents: Tensor, plan: Plan, draw_noise: DrawNoise) -> Iterator[Step]:
        """See `Sampler.run`; draws noise once a step, after the prediction, if `stochastic`."""

        def denoise(x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            variance = level.sigma**2 + self.sigma_data**2
            c_skip, c_out = self.sigma_data**2 / variance, level.sigma * self.sigma_data / math.sqrt(variance)
            output = predict(x / math.sqrt(variance), timestep).to(x)
            return output, c_skip * x + c_out * output

        return multistep(self, edm_level, denoise, latents, plan, draw_noise)


def whole_plan(
    schedule: NoiseSchedule, num_steps: int | None, timesteps: Values, karras: bool, spacing: str, final: float
) -> Plan:
    """A plan through whole timesteps, which divide the training range into num_steps steps, ending at level `final`."""
    if karras:
        schedule.check_num_steps(num_steps)
        levels = karras_sigmas(schedule.sigmas[0].item(), schedule.sigmas[-1].item(), num_steps)
        visited = schedule.timestep_at(levels).round()
    else:
        if timesteps is None:
            visited = schedule.spaced_timesteps(num_steps, spacing, with_end=True).round()
        else:
            visited = schedule.custom_timesteps(timesteps)
            if (visited % 1).any():
                raise ValueError("custom timesteps for DPM-Solver++ must be whole numbers.")
        levels = schedule.sigma_at(visited)
    levels = torch.tensor(np.append(levels, final), dtype=torch.float32)
    return Plan(torch.tensor(visited, dtype=torch.int64), levels, 1.0)


def check_settings(sampler: DPMSolverPP | EDMDPMSolverPP) -> None:
    """Raises ValueError for settings that no DPM-Solver++ has."""
    check_choice("solver_type", sampler.solver_type, ("midpoint", "heun"))
    check_choice("final_sigmas_type", sampler.final_sigmas_type, ("zero", "sigma_min"))
    kind, orders = ("stochastic ", (1, 2)) if sampler.stochastic else ("", (1, 2, 3))
    if sampler.order not in orders:
        raise ValueError(f"the order of {kind}DPM-Solver++ is {sampler.order!r}, but must be one of {orders}.")
