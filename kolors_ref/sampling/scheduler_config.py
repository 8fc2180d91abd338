"""A checkpoint's `scheduler_config.json`, in diffusers' terms, read into a schedule and a sampler.

A missing field takes the default of the diffusers class that the file names, which is not always Kolors' value. A field
that asks for mathematics not implemented here is refused; one that the named class does not read is ignored.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kolors_ref.config import ScheduleConfig
from kolors_ref.sampling.dpm_solver import DPMSolverPP, DPMSolverPPSingle, EDMDPMSolverPP
from kolors_ref.sampling.protocol import Sampler, check_choice
from kolors_ref.sampling.samplers import DDIM, Euler, EulerAncestral, Heun

Fields = dict[str, Any]

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
DPM = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}

EPSILON = {"prediction_type": "epsilon", "trained_betas": None}
PLAIN_BETAS = {"rescale_betas_zero_snr": False}
PLAIN_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
PLAIN_EULER = {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None}
PLAIN_DPM = {"thresholding": False, "use_flow_sigmas": False, "variance_type": None, "lambda_min_clipped": -math.inf}


@dataclass(frozen=True)
class SchedulerClass:
    """How one diffusers class is read: its defaults, the only values that some fields may have, and our sampler."""

    defaults: Fields
    only: Fields
    sampler: Callable[[Fields], Sampler]


def read_multistep(fields: Fields) -> Sampler:
    """DPMSolverMultistepScheduler."""
    return DPMSolverPP(karras=bool(fields["use_karras_sigmas"]), **dpm_settings(fields))


def read_edm(fields: Fields) -> Sampler:
    """EDMDPMSolverMultistepScheduler."""
    return EDMDPMSolverPP(**{field: float(fields[field]) for field in EDM}, **dpm_settings(fields))


def dpm_settings(fields: Fields) -> Fields:
    """The settings that both multistep classes have; ValueError for an algorithm that is not DPM-Solver++."""
    check_choice("algorithm_type", fields["algorithm_type"], ("dpmsolver++", "sde-dpmsolver++"))
    stochastic = fields["algorithm_type"] == "sde-dpmsolver++"
    check_choice("solver_order", fields["solver_order"], (1, 2) if stochastic else (1, 2, 3))
    kept = ("solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type")
    return {"order": fields["solver_order"], "stochastic": stochastic, **{field: fields[field] for field in kept}}


CLASSES = {
    "EulerDiscreteScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED, "use_karras_sigmas": False},
        only={**EPSILON, **PLAIN_BETAS, **PLAIN_SIGMAS, **PLAIN_EULER, "final_sigmas_type": "zero"},
        sampler=lambda fields: Euler(karras=bool(fields["use_karras_sigmas"])),
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED},
        only={**EPSILON, **PLAIN_BETAS},
        sampler=lambda fields: EulerAncestral(),
    ),
    "HeunDiscreteScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED, "beta_start": 0.00085, "beta_end": 0.012, "use_karras_sigmas": False},
        only={**EPSILON, **PLAIN_SIGMAS, "clip_sample": False},
        sampler=lambda fields: Heun(karras=bool(fields["use_karras_sigmas"])),
    ),
    "DDIMScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED, "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True},
        only={**EPSILON, **PLAIN_BETAS, "thresholding": False, "clip_sample": False},
        sampler=lambda fields: DDIM(final_sigmas_type="zero" if fields["set_alpha_to_one"] else "sigma_min"),
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED, **DPM, "use_karras_sigmas": False},
        only={**EPSILON, **PLAIN_BETAS, **PLAIN_SIGMAS, **PLAIN_DPM, "use_lu_lambdas": False},
        sampler=read_multistep,
    ),
    # `lower_order_final` is not read: diffusers turns it on by itself wherever the last sigma is zero.
    "DPMSolverSinglestepScheduler": SchedulerClass(
        defaults={**BETAS, **SPACED, "use_karras_sigmas": False, "solver_type": "midpoint"},
        only={
            **EPSILON,
            **PLAIN_SIGMAS,
            **PLAIN_DPM,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "final_sigmas_type": "zero",
        },
        sampler=lambda fields: DPMSolverPPSingle(bool(fields["use_karras_sigmas"]), fields["solver_type"]),
    ),
    # It has no betas; a file without them gets Kolors', which this sampler does not use.
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        defaults={**asdict(ScheduleConfig()), **DPM, **EDM},
        only={"prediction_type": "epsilon", "thresholding": False, "sigma_schedule": "karras"},
        sampler=read_edm,
    ),
}


def read_scheduler_config(config: Fields) -> tuple[ScheduleConfig, Sampler]:
    """The schedule and the sampler that the fields of a `scheduler_config.json` describe.

    Raises ValueError, naming the field and its value, for a class or a value that is not supported.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"the scheduler's _class_name is {name!r}, but must be one of {', '.join(CLASSES)}.")
    kind = CLASSES[name]
    for field, supported in kind.only.items():
        value = config.get(field, kind.defaults.get(field, supported))
        if value != supported and (value or supported):  # null and false are the same "no"
            raise ValueError(f"{name} with {field} = {value!r} is not supported; {field} must be {supported!r}.")
    fields = {field: config.get(field, default) for field, default in kind.defaults.items()}
    for field, default in kind.defaults.items():
        value, kind_of = fields[field], type(default)
        if kind_of in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, kind_of))):
            raise ValueError(f"{name} with {field} = {value!r} is not supported; {field} must be a number.")
        if kind_of is bool and value not in (None, False, True):
            raise ValueError(f"{name} with {field} = {value!r} is not supported; {field} must be true or false.")
    schedule = ScheduleConfig(**{field: fields[field] for field in asdict(ScheduleConfig())})
    return schedule, kind.sampler(fields)
