"""The schedule's numbers, the facts known of Kolors', and plans."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from kolors_ref.config import SDXL_SCHEDULE, ScheduleConfig
from kolors_ref.sampling.samplers import SAMPLERS, Euler
from kolors_ref.sampling.schedule import NoiseSchedule, Plan, edm_level, karras_sigmas, vp_level

KOLORS = NoiseSchedule(ScheduleConfig())


@pytest.mark.parametrize(
    "config", [KOLORS.config, SDXL_SCHEDULE, ScheduleConfig(1000, 0.0001, 0.02, "linear", "linspace", 0)]
)
def test_tables_are_the_oracles_bit_for_bit(config):
    schedule = NoiseSchedule(config)
    oracle = diffusers.DPMSolverMultistepScheduler(
        config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule
    )
    assert torch.equal(schedule.betas, oracle.betas)
    assert torch.equal(schedule.alphas_cumprod, oracle.alphas_cumprod)
    assert torch.equal(schedule.sigmas, oracle.sigmas)
    assert schedule.sigmas.dtype == torch.float32
    assert (schedule.sigmas.diff() > 0).all()


@pytest.mark.parametrize(("config", "snr"), [(KOLORS.config, 0.0012), (SDXL_SCHEDULE, 0.0047)])
def test_terminal_snr(config, snr):
    """Kolors is trained to four times more noise than SDXL."""
    assert round(NoiseSchedule(config).sigmas[-1].item() ** -2, 4) == snr


def test_euler_starts_at_the_known_scale():
    assert round(Euler().plan(KOLORS, 25).initial_scale, 4) == 21.8068


def test_karras_plan_of_kolors():
    plan = SAMPLERS["dpmpp-2m-karras"].plan(KOLORS, 25)
    assert plan.timesteps[:4].tolist() == [1099, 1072, 1044, 1013]
    assert round(plan.sigmas[0].item(), 2) == 29.06
    assert plan.initial_scale == 1.0


@pytest.mark.parametrize(
    ("spacing", "with_end", "expected"),
    [
        ("leading", False, [826, 551, 276, 1]),
        ("leading", True, [881, 661, 441, 221]),
        ("linspace", False, [1099, 1099 * 2 / 3, 1099 / 3, 0]),
        ("linspace", True, [1099, 824.25, 549.5, 274.75]),
        ("trailing", False, [1099, 824, 549, 274]),
        ("trailing", True, [1099, 824, 549, 274]),
    ],
)
def test_spacings(spacing, with_end, expected):
    np.testing.assert_allclose(KOLORS.spaced_timesteps(4, spacing, with_end), expected, rtol=1e-14)


def test_every_count_of_trailing_steps_is_kept():
    """Floating point makes the range one too long for some counts, such as 15 of 1100."""
    for n in range(1, 1101):
        timesteps = KOLORS.spaced_timesteps(n, "trailing")
        assert len(timesteps) == n
        assert timesteps[0] == 1099
        assert timesteps[-1] >= 0


def test_sigma_and_timestep_are_inverse():
    whole = np.arange(0, 1100, 7)
    np.testing.assert_array_equal(KOLORS.sigma_at(whole), KOLORS.sigmas.numpy()[whole].astype(np.float64))
    np.testing.assert_allclose(KOLORS.timestep_at(KOLORS.sigma_at(whole)), whole, atol=1e-4)
    assert KOLORS.timestep_at(np.array([1e3, 1e-3])).tolist() == [1099.0, 0.0]
    between = KOLORS.sigma_at(np.array([10.25]))[0]
    assert between == pytest.approx(0.75 * KOLORS.sigmas[10].item() + 0.25 * KOLORS.sigmas[11].item(), rel=1e-12)


def test_karras_sigmas():
    sigmas = karras_sigmas(0.03, 15.0, 6)
    assert sigmas[0] == pytest.approx(15.0)
    assert sigmas[-1] == pytest.approx(0.03)
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7)), (0.03 ** (1 / 7) - 15.0 ** (1 / 7)) / 5, rtol=1e-12)
    assert karras_sigmas(0.03, 15.0, 1) == pytest.approx([15.0])


def test_levels():
    vp, edm = vp_level(2.0), edm_level(2.0)
    assert vp.alpha**2 + vp.sigma**2 == pytest.approx(1.0)
    assert vp.sigma / vp.alpha == pytest.approx(edm.sigma / edm.alpha) == 2.0
    assert vp.lam == edm.lam == pytest.approx(np.log(vp.alpha / vp.sigma))
    assert vp_level(0.0) == edm_level(0.0) == (1.0, 0.0, float("inf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": 10**30}, "must be from 1 to 100000"),
        ({"beta_start": 1e-320}, "is no noise at all"),
        ({"beta_end": 0.5}, "beta_end 0.5 leaves nothing but noise after 1100 timesteps"),
        ({"beta_start": 0.02}, "beta_start 0.02 and beta_end 0.014"),
        ({"steps_offset": -1}, "steps_offset is -1"),
    ],
)
def test_configurations_that_are_no_schedule(change, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(replace(KOLORS.config, **change))


@pytest.mark.parametrize("num_steps", [0, -3, 1101, 2.5, "25"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_counts_of_steps_that_are_none(name, num_steps):
    with pytest.raises(ValueError, match="must be a whole number from 1 to 1100"):
        SAMPLERS[name].plan(KOLORS, num_steps)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp-2m", "dpmpp-2s"])
def test_more_steps_than_the_spacing_can_tell_apart(name):
    """All 1100 timesteps, moved by the offset of 1, would leave the range; DPM-Solver needs one point more still."""
    with pytest.raises(ValueError, match=r"1100 steps are too many for .* spacing of 1100 training timesteps"):
        SAMPLERS[name].plan(KOLORS, 1100)
    plan = SAMPLERS[name].plan(KOLORS, 1098)
    assert plan.num_steps == 1098
    assert plan.timesteps.max() <= 1099


def test_plan_from_step():
    plan = Plan(torch.tensor([900, 500, 100]), torch.tensor([9.0, 4.0, 1.0, 0.0]), 1.0)
    later = plan.from_step(2)
    assert (later.begin, later.first_sigma, later.num_steps) == (2, 1.0, 3)
    assert plan.begin == 0
    for begin in (-1, 3):
        with pytest.raises(ValueError, match=f"cannot begin at step {begin}: its steps are 0 to 2"):
            plan.from_step(begin)
