"""What every sampler has in common: its shape, its purity, its errors."""

import pytest
import torch

from kolors_ref.config import ScheduleConfig
from kolors_ref.sampling.samplers import (
    DDIM,
    SAMPLERS,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMDPMSolverPP,
    Euler,
    get_sampler,
)
from kolors_ref.sampling.schedule import NoiseSchedule, vp_level

SCHEDULE = NoiseSchedule(ScheduleConfig())
LATENTS = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
STOCHASTIC = {"euler-ancestral", "dpmpp-2m-sde", "dpmpp-2m-sde-karras"}


def network(x, timestep):
    return 0.8 * x + 0.2 * torch.sin(x + timestep / 300)


def draw_noise():
    return torch.full(LATENTS.shape, 0.5)


def recorded_network():
    """The network, and the list of its inputs and outputs that it keeps."""
    seen = []

    def predict(x, timestep):
        seen.append((x, network(x, timestep)))
        return seen[-1][1]

    return predict, seen


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_of_a_run(name):
    """index, timestep and sigma follow the plan from where it begins; the network's output is kept as it came."""
    sampler, (predict, seen) = get_sampler(name), recorded_network()
    plan = sampler.plan(SCHEDULE, 6).from_step(2)
    steps = list(sampler.run(predict, LATENTS, plan, draw_noise))
    assert [step.index for step in steps] == [2, 3, 4, 5]
    assert [step.timestep for step in steps] == plan.timesteps[2:].tolist()
    assert [step.sigma for step in steps] == plan.sigmas[2:6].tolist()
    assert all(step.timestep.shape == () and step.latents.shape == LATENTS.shape for step in steps)
    first = [0, 2, 4, 6] if name.startswith("heun") else [0, 1, 2, 3]
    assert len(seen) == (7 if name.startswith("heun") else 4)
    assert all(torch.equal(step.noise_pred, seen[k][1]) for k, step in zip(first, steps, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoised_picture_of_a_step(name):
    """What is left of the network's input, scaled back, without the noise that it predicts."""
    sampler, (predict, seen) = get_sampler(name), recorded_network()
    for step in sampler.run(predict, LATENTS.double(), sampler.plan(SCHEDULE, 6), draw_noise):
        x, output = seen[step.index * (2 if name.startswith("heun") else 1)]
        if name.startswith("edm"):
            variance = step.sigma**2 + 0.5**2
            expected = 0.5**2 / variance**0.5 * x + step.sigma * 0.5 / variance**0.5 * output
        else:
            expected = (step.sigma**2 + 1) ** 0.5 * x - step.sigma * output
        torch.testing.assert_close(step.denoised, expected)
    if sampler.plan(SCHEDULE, 6).sigmas[-1] == 0:
        torch.testing.assert_close(step.denoised, step.latents)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_leaves_nothing_behind(name):
    """Two runs of one sampler, interleaved, are each what they would be alone; the given latents stay as they were."""
    sampler, given = get_sampler(name), LATENTS.clone()
    plan = sampler.plan(SCHEDULE, 5)
    alone = [step.latents for step in sampler.run(network, given, plan, draw_noise)]
    pairs = zip(
        sampler.run(network, given, plan, draw_noise), sampler.run(network, -given, plan, draw_noise), strict=True
    )
    assert all(torch.equal(step.latents, latents) for (step, _), latents in zip(pairs, alone, strict=True))
    assert torch.equal(given, LATENTS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_once_a_step_or_never(name):
    drawn = []
    sampler = get_sampler(name)
    for _ in sampler.run(network, LATENTS, sampler.plan(SCHEDULE, 4), lambda: drawn.append(1) or draw_noise()):
        pass
    assert len(drawn) == (4 if name in STOCHASTIC else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_runs_in_fp32(name, dtype):
    """Latents and noise in half precision give the fp32 run from the same values, the network's rounding aside."""
    sampler, half = get_sampler(name), LATENTS.to(dtype)
    plan = sampler.plan(SCHEDULE, 5)
    rounded = lambda x, timestep: network(x, timestep).to(dtype)
    steps = list(sampler.run(rounded, half, plan, lambda: draw_noise().to(dtype)))
    same = list(sampler.run(lambda x, t: rounded(x, t).float(), half.float(), plan, draw_noise))
    assert all(step.latents.dtype == torch.float32 for step in steps)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(steps, same, strict=True))
    assert sampler.add_noise(half, half, plan).dtype == torch.float32
    assert torch.equal(sampler.add_noise(half, half, plan), sampler.add_noise(half.float(), half.float(), plan))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - STOCHASTIC - {"edm-dpmpp-2m"}))
def test_perfect_prediction_recovers_the_picture(name):
    """Whoever knows the noise gets the picture, up to the level of noise that the plan ends at."""
    sampler, picture = get_sampler(name), LATENTS.double()
    plan = sampler.plan(SCHEDULE, 8)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = {timestep.item(): sigma.item() for timestep, sigma in zip(plan.timesteps, plan.sigmas[:-1], strict=True)}

    def knowing(x, timestep):
        level = vp_level(sigmas[timestep.item()])
        return (x - level.alpha * picture) / level.sigma

    *_, last = sampler.run(knowing, sampler.add_noise(picture, noise, plan), plan, draw_noise)
    end = vp_level(plan.sigmas[-1].item())
    torch.testing.assert_close(last.latents, end.alpha * picture + end.sigma * noise, rtol=0, atol=1e-12)


def test_get_sampler():
    assert get_sampler("dpmpp-2m-karras") == DPMSolverPP(karras=True)
    mine = DPMSolverPP(order=3)
    assert get_sampler(mine) is mine


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dpm++2m", "dpmpp-2m"),
        ("Euler", "euler"),
        ("eular-karras", "euler-karras"),
        ("DDIM", "ddim"),
        ("DPM++ 2M Karras", "dpmpp-2m-karras"),
    ],
)
def test_unknown_names(name, nearest):
    with pytest.raises(ValueError, match=f"nearest is '{nearest}', of euler, .*edm-dpmpp-2m"):
        get_sampler(name)


@pytest.mark.parametrize("sampler", [None, 3, Euler, object()])
def test_things_that_are_no_sampler(sampler):
    with pytest.raises(TypeError, match="a sampler must be a name or an instance"):
        get_sampler(sampler)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverPP(order=4), r"order of DPM-Solver\+\+ is 4"),
        (lambda: EDMDPMSolverPP(order=0), r"order of DPM-Solver\+\+ is 0"),
        (lambda: DPMSolverPP(solver_type="bh2"), "solver_type is 'bh2'"),
        (lambda: DPMSolverPPSingle(solver_type="bh2"), "solver_type is 'bh2'"),
        (lambda: DPMSolverPP(final_sigmas_type="one"), "final_sigmas_type is 'one'"),
        (lambda: DDIM(final_sigmas_type="one"), "final_sigmas_type is 'one'"),
        (lambda: DDIM(eta=1.5), "eta is 1.5"),
        (lambda: EDMDPMSolverPP(sigma_min=90.0), "sigma_min 90.0 must lie between 0 and a finite sigma_max 80.0"),
    ],
)
def test_settings_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name", sorted(set(SAMPLERS) - {"euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpmpp-2s"})
)
def test_samplers_without_custom_timesteps(name):
    with pytest.raises(ValueError, match="custom"):
        SAMPLERS[name].plan(SCHEDULE, timesteps=[900, 500, 100])


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"euler"}))
def test_samplers_without_custom_sigmas(name):
    with pytest.raises(ValueError, match="custom"):
        SAMPLERS[name].plan(SCHEDULE, sigmas=[10.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "request_", [{}, {"num_steps": 3, "timesteps": [500, 300, 1]}, {"timesteps": [5], "sigmas": [5, 0]}]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_exactly_one_request(name, request_):
    with pytest.raises(ValueError, match="exactly one of"):
        SAMPLERS[name].plan(SCHEDULE, **request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"timesteps": [500, 500, 1]}, "each smaller than the one before"),
        ({"timesteps": [1, 500]}, "each smaller than the one before"),
        ({"timesteps": "abc"}, "custom timesteps must be a list of numbers, but some are text"),
        ({"sigmas": ["3", "1"]}, "custom sigmas must be a list of numbers, but some are text"),
        ({"sigmas": [[3], [2, 1]]}, "custom sigmas must be a list of numbers, but setting an array"),
        ({"sigmas": [1e50, 1e49, 0.0]}, "custom sigmas must be two or more numbers, finite"),
        ({"sigmas": [10**400, 1]}, "custom sigmas must be a list of numbers"),
        ({"sigmas": [1e50, 1.0, 0.0]}, "custom sigmas must be two or more numbers, finite"),
        ({"timesteps": []}, "each smaller than the one before"),
        ({"timesteps": [float("nan"), 3]}, "each smaller than the one before"),
        ({"timesteps": [1100, 500]}, "must lie in 0 to 1099, but run from 1100 to 500"),
        ({"timesteps": [500, -1]}, "must lie in 0 to 1099, but run from 500 to -1"),
        ({"sigmas": [5.0]}, "two or more numbers"),
        ({"sigmas": [5.0, 6.0, 0.0]}, "each below the one before"),
        ({"sigmas": [5.0, 1.0, -1.0]}, "none below 0"),
        ({"sigmas": [5.0, float("nan")]}, "each below the one before"),
    ],
)
def test_custom_requests_that_are_no_plan(request_, message):
    with pytest.raises(ValueError, match=message):
        Euler().plan(SCHEDULE, **request_)


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-2s"])
def test_dpm_solver_needs_whole_timesteps(name):
    with pytest.raises(ValueError, match="must be whole numbers"):
        SAMPLERS[name].plan(SCHEDULE, timesteps=[900.5, 100])


def test_custom_values_may_be_arrays():
    plan = Euler().plan(SCHEDULE, timesteps=torch.tensor([900, 500, 100]))
    assert torch.equal(plan.sigmas, Euler().plan(SCHEDULE, timesteps=[900, 500, 100]).sigmas)
