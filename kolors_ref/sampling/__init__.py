"""How noise is removed: the schedule, the samplers. No network in sight."""

from kolors_ref.sampling.protocol import Sampler, Step
from kolors_ref.sampling.samplers import (
    DDIM,
    SAMPLERS,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMDPMSolverPP,
    Euler,
    EulerAncestral,
    Heun,
    get_sampler,
)
from kolors_ref.sampling.schedule import NoiseSchedule, Plan, karras_sigmas
from kolors_ref.sampling.scheduler_config import read_scheduler_config

__all__ = [
    "DDIM",
    "SAMPLERS",
    "DPMSolverPP",
    "DPMSolverPPSingle",
    "EDMDPMSolverPP",
    "Euler",
    "EulerAncestral",
    "Heun",
    "NoiseSchedule",
    "Plan",
    "Sampler",
    "Step",
    "get_sampler",
    "karras_sigmas",
    "read_scheduler_config",
]
