"""scheduler_config.json against diffusers: the same file gives the same plan."""

import math

import diffusers
import pytest
import torch

from kolors_ref.config import SDXL_SCHEDULE, ScheduleConfig
from kolors_ref.sampling.samplers import (
    DDIM,
    SAMPLERS,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMDPMSolverPP,
    Euler,
    EulerAncestral,
    Heun,
)
from kolors_ref.sampling.schedule import NoiseSchedule
from kolors_ref.sampling.scheduler_config import CLASSES, read_scheduler_config

OFFICIAL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.18.0.dev0",
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1100,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def check_same_plan(config):
    """The plans that diffusers and we make of one file agree."""
    oracle = getattr(diffusers, config["_class_name"]).from_config(config)
    oracle.set_timesteps(9)
    schedule, sampler = read_scheduler_config(config)
    plan = sampler.plan(NoiseSchedule(schedule), 9)
    timesteps = oracle.timesteps[::2] if oracle.order == 2 else oracle.timesteps
    torch.testing.assert_close(plan.timesteps, timesteps, rtol=2e-6, atol=0)
    assert plan.initial_scale == pytest.approx(float(oracle.init_noise_sigma), rel=1e-12)
    if hasattr(oracle, "alphas_cumprod"):
        assert torch.equal(NoiseSchedule(schedule).alphas_cumprod, oracle.alphas_cumprod)


def test_official_file():
    assert read_scheduler_config(OFFICIAL) == (ScheduleConfig(), Euler())
    check_same_plan(OFFICIAL)


def test_sdxl_file():
    schedule, _ = read_scheduler_config({**OFFICIAL, "num_train_timesteps": 1000, "beta_end": 0.012})
    assert schedule == SDXL_SCHEDULE


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("EulerDiscreteScheduler", Euler()),
        ("EulerAncestralDiscreteScheduler", EulerAncestral()),
        ("HeunDiscreteScheduler", Heun()),
        ("DDIMScheduler", DDIM()),
        ("DPMSolverMultistepScheduler", DPMSolverPP()),
        ("DPMSolverSinglestepScheduler", DPMSolverPPSingle()),
        ("EDMDPMSolverMultistepScheduler", EDMDPMSolverPP()),
    ],
)
def test_every_class_from_the_official_fields(name, sampler):
    """As after `SomeScheduler.from_config(pipe.scheduler.config)` in diffusers, saved."""
    config = {**OFFICIAL, "_class_name": name}
    assert read_scheduler_config(config) == (ScheduleConfig(), sampler)
    check_same_plan(config)
    saved = dict(getattr(diffusers, name).from_config(config).config)
    assert read_scheduler_config({**saved, "_class_name": name}) == (ScheduleConfig(), sampler)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"DDIMScheduler"}))
def test_missing_fields_are_diffusers_defaults(name):
    check_same_plan({"_class_name": name})


def test_ddims_own_default_clips():
    """An empty DDIM file asks for clipping, which latents do not survive."""
    with pytest.raises(ValueError, match="DDIMScheduler with clip_sample = True is not supported"):
        read_scheduler_config({"_class_name": "DDIMScheduler"})
    check_same_plan({"_class_name": "DDIMScheduler", "clip_sample": False})


def test_settings_are_read():
    dpm = {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 1,
        "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun",
        "lower_order_final": False,
        "euler_at_final": True,
        "final_sigmas_type": "sigma_min",
        "lambda_min_clipped": -float("inf"),
    }
    assert read_scheduler_config(dpm)[1] == DPMSolverPP(1, True, True, "heun", False, True, "sigma_min")
    edm = {**dpm, "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.01, "sigma_max": 50, "rho": 5.0}
    expected = EDMDPMSolverPP(1, 0.01, 50.0, 0.5, 5.0, True, "heun", False, True, "sigma_min")
    assert read_scheduler_config({**edm, "sigma_data": 0.5})[1] == expected
    single = {"_class_name": "DPMSolverSinglestepScheduler", "use_karras_sigmas": True, "solver_type": "heun"}
    assert read_scheduler_config(single)[1] == DPMSolverPPSingle(karras=True, solver_type="heun")
    for name, kind in (("EulerDiscreteScheduler", Euler), ("HeunDiscreteScheduler", Heun)):
        assert read_scheduler_config({"_class_name": name, "use_karras_sigmas": True})[1] == kind(karras=True)
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False}
    assert read_scheduler_config({**ddim, "set_alpha_to_one": True})[1] == DDIM(final_sigmas_type="zero")
    assert read_scheduler_config({**ddim, "set_alpha_to_one": False})[1] == SAMPLERS["ddim"]


@pytest.mark.parametrize("name", CLASSES)
def test_null_is_no(name):
    config = {**OFFICIAL, "_class_name": name, "use_karras_sigmas": None, "thresholding": None, "use_beta_sigmas": None}
    assert read_scheduler_config(config) == read_scheduler_config({**OFFICIAL, "_class_name": name})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("EulerDiscreteScheduler", "prediction_type", "v_prediction"),
        ("EulerDiscreteScheduler", "rescale_betas_zero_snr", True),
        ("EulerDiscreteScheduler", "trained_betas", [0.1, 0.2]),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("EulerDiscreteScheduler", "sigma_max", 30.0),
        ("EulerAncestralDiscreteScheduler", "prediction_type", "v_prediction"),
        ("HeunDiscreteScheduler", "clip_sample", True),
        ("HeunDiscreteScheduler", "prediction_type", "sample"),
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("DPMSolverMultistepScheduler", "variance_type", "learned_range"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_order", 4),
        ("DPMSolverMultistepScheduler", "solver_type", "bh2"),
        ("DPMSolverSinglestepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverSinglestepScheduler", "solver_order", 3),
        ("DPMSolverSinglestepScheduler", "final_sigmas_type", "sigma_min"),
        ("EDMDPMSolverMultistepScheduler", "sigma_schedule", "exponential"),
        ("EDMDPMSolverMultistepScheduler", "prediction_type", "v_prediction"),
        ("EulerDiscreteScheduler", "num_train_timesteps", "1100"),
        ("EulerDiscreteScheduler", "num_train_timesteps", 1100.5),
        ("EulerDiscreteScheduler", "beta_start", None),
        ("EDMDPMSolverMultistepScheduler", "sigma_max", "80"),
        ("EulerDiscreteScheduler", "num_train_timesteps", True),
        ("EulerDiscreteScheduler", "use_karras_sigmas", "false"),
        ("DPMSolverMultistepScheduler", "lower_order_final", "no"),
        ("EDMDPMSolverMultistepScheduler", "rho", 0),
        ("EDMDPMSolverMultistepScheduler", "rho", -1.0),
        ("EDMDPMSolverMultistepScheduler", "sigma_data", 0.0),
        ("EDMDPMSolverMultistepScheduler", "sigma_max", math.inf),
        ([], "_class_name", []),
        ("PNDMScheduler", "_class_name", "PNDMScheduler"),
        (None, "_class_name", None),
    ],
)
def test_unsupported_values_are_named(name, field, value):
    with pytest.raises(ValueError, match=field) as error:
        read_scheduler_config({**OFFICIAL, "_class_name": name, field: value})
    assert repr(value) in str(error.value)


def test_fields_of_other_classes_are_ignored():
    """A file keeps the fields of every class it has been through."""
    strange = {"thresholding": True, "solver_order": 7, "use_lu_lambdas": True, "something_else": 3}
    assert read_scheduler_config({**OFFICIAL, **strange}) == (ScheduleConfig(), Euler())


def test_a_table_that_is_not_here_is_refused_by_the_schedule():
    schedule, _ = read_scheduler_config({**OFFICIAL, "beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(ValueError, match="beta_schedule is 'squaredcos_cap_v2'"):
        NoiseSchedule(schedule)
