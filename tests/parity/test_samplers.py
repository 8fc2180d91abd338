"""Samplers against diffusers' schedulers: the same plan, and the same trajectory around the same fake network.

Two comparisons. "Exact": diffusers computes a step's coefficients in fp32 and casts latents to fp32 inside it; with
both lifted to fp64 (`lift`, `in_double`) the trajectories agree to 1e-10, so the mathematics is the same. "As shipped":
nothing is lifted, and what remains is diffusers' own rounding, below 1e-6 of the latents' scale.
"""

import inspect
import itertools
from contextlib import contextmanager
from dataclasses import asdict, replace

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

KOLORS = ScheduleConfig()
SHAPE = (2, 4, 3, 5)
STEPS = (1, 2, 3, 5, 25, 50, 100)
ORACLES = {
    Euler: diffusers.EulerDiscreteScheduler,
    EulerAncestral: diffusers.EulerAncestralDiscreteScheduler,
    Heun: diffusers.HeunDiscreteScheduler,
    DDIM: diffusers.DDIMScheduler,
    DPMSolverPP: diffusers.DPMSolverMultistepScheduler,
    DPMSolverPPSingle: diffusers.DPMSolverSinglestepScheduler,
    EDMDPMSolverPP: diffusers.EDMDPMSolverMultistepScheduler,
}
SETTINGS = {
    **SAMPLERS,
    "ddim-zero": DDIM(final_sigmas_type="zero"),
    "ddim-eta": DDIM(eta=0.7),
    "ddpm": DDIM(eta=1.0, final_sigmas_type="zero"),
    "dpmpp-1": DPMSolverPP(order=1),
    "dpmpp-2s-heun": DPMSolverPPSingle(solver_type="heun"),
    "edm-dpmpp-1": EDMDPMSolverPP(order=1),
    "edm-dpmpp-3m": EDMDPMSolverPP(order=3, sigma_data=0.8, sigma_min=0.01, sigma_max=40.0, rho=5.0),
    "edm-dpmpp-2m-heun": EDMDPMSolverPP(solver_type="heun", euler_at_final=True),
    "edm-dpmpp-2m-sde": EDMDPMSolverPP(stochastic=True, lower_order_final=False),
}
SCHEDULES = {
    f"{name}-{spacing}": replace(config, timestep_spacing=spacing)
    for name, config in (("kolors", KOLORS), ("sdxl", SDXL_SCHEDULE))
    for spacing in ("leading", "linspace", "trailing")
}


class TorchInDouble:
    """torch, but for its float32 being float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def in_double():
    """Lifts the oracles' fp32 casts of the latents; entered once their tables, which stay fp32, have been made."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep"):
            patch.setattr(getattr(diffusers.schedulers, f"scheduling_{name}"), "torch", TorchInDouble())
        yield


def make_oracle(sampler, config=KOLORS):
    """diffusers' scheduler with the settings of `sampler` over the schedule of `config`."""
    fields = asdict(config) | {k: v for k, v in asdict(sampler).items() if k != "order"}
    fields |= {"solver_order": getattr(sampler, "order", 2), "use_karras_sigmas": getattr(sampler, "karras", False)}
    fields |= {"algorithm_type": "sde-dpmsolver++" if getattr(sampler, "stochastic", False) else "dpmsolver++"}
    fields |= {"set_alpha_to_one": fields.get("final_sigmas_type") == "zero", "clip_sample": False}
    kind = ORACLES[type(sampler)]
    if kind is diffusers.DPMSolverSinglestepScheduler:
        fields["lower_order_final"] = True
    known = inspect.signature(kind.__init__).parameters
    return kind(**{k: v for k, v in fields.items() if k in known})


def lift(oracle, plan):
    """Gives `oracle` fp64 coefficients, made from the same fp32 sigmas that our plan holds."""
    if isinstance(oracle, diffusers.DDIMScheduler):
        table = ((1 - oracle.alphas_cumprod) / oracle.alphas_cumprod).sqrt().double()
        oracle.alphas_cumprod = 1 / (table**2 + 1)
        one = torch.tensor(1.0, dtype=torch.float64)
        oracle.final_alpha_cumprod = one if oracle.config.set_alpha_to_one else oracle.alphas_cumprod[0]
    elif isinstance(oracle, diffusers.EDMDPMSolverMultistepScheduler):
        oracle.sigmas, oracle.timesteps = plan.sigmas.double(), plan.timesteps
    else:
        oracle.sigmas = oracle.sigmas.double()


def latents_like(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 2


def network(x, timestep):
    """A smooth denoiser: most of the noise, and something nonlinear of position in time and of every channel."""
    wave = torch.sin(0.01 * timestep.double() + torch.arange(4, dtype=torch.float64)).view(4, 1, 1)
    mixed = torch.einsum("oc,bchw->bohw", MIXING.to(x.dtype), x)
    return (0.85 * x + 0.3 * torch.tanh(mixed + wave)).to(x.dtype)


def run_oracle(oracle, x, begin=0, eta=None, seed=11):
    """The latents after each of our steps, and the generator as the run leaves it.

    diffusers' DDIM steps from t to t - T // n, which is the next timestep of its own list in "leading" spacing alone;
    in the others it is told, for each step, the T // n that leads there.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = inspect.signature(oracle.step).parameters
    extra = {k: v for k, v in (("generator", generator), ("eta", eta)) if k in taken and v is not None}
    if hasattr(oracle, "set_begin_index"):
        oracle.set_begin_index(begin * oracle.order)
    trajectory, ddim = [], isinstance(oracle, diffusers.DDIMScheduler)
    ends = [*oracle.timesteps.tolist()[1:], -1]
    for i, t in enumerate(oracle.timesteps[begin * oracle.order :], begin):
        if ddim and oracle.config.timestep_spacing != "leading":
            oracle.num_inference_steps = 1
            oracle.register_to_config(num_train_timesteps=t.item() - ends[i])
        noise_pred = network(oracle.scale_model_input(x, t), t)
        x = oracle.step(noise_pred, t, x, **extra).prev_sample
        trajectory.append(x)
    if oracle.order == 2:  # Heun: two of the oracle's steps are one of ours, but for the last
        trajectory = trajectory[1::2] + trajectory[-1:]
    return trajectory, generator


def run_ours(sampler, x, plan, seed=11, noise_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    draw_noise = lambda: torch.randn(SHAPE, generator=generator, dtype=noise_dtype or x.dtype)
    return [step.latents for step in sampler.run(network, x, plan, draw_noise)], generator


def worst(ours, theirs):
    """The largest difference in any step, relative to the largest latent of that step."""
    assert len(ours) == len(theirs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def check_plan(oracle, plan, atol=0.0):
    """The same timesteps, sigmas and initial scale, in Heun's case each once."""
    timesteps, sigmas = oracle.timesteps, getattr(oracle, "sigmas", None)
    if oracle.order == 2:
        timesteps, sigmas = timesteps[::2], torch.cat([sigmas[:-1:2], sigmas[-1:]])
    assert plan.timesteps.dtype == timesteps.dtype
    torch.testing.assert_close(plan.timesteps, timesteps, rtol=0, atol=atol)
    if sigmas is not None:  # DDIM has none
        assert torch.equal(plan.sigmas, sigmas)
    assert plan.initial_scale == float(oracle.init_noise_sigma)


def check_exact(sampler, config, begin=0, **request):
    """Plans equal; trajectories in fp64 within 1e-10; the same number of noises drawn."""
    oracle, plan = make_oracle(sampler, config), sampler.plan(NoiseSchedule(config), **request)
    oracle.set_timesteps(**{"num_inference_steps" if k == "num_steps" else k: v for k, v in request.items()})
    if not isinstance(sampler, EDMDPMSolverPP):
        check_plan(oracle, plan)
    lift(oracle, plan)
    plan = plan.from_step(begin)
    x = latents_like(0) * plan.initial_scale
    with in_double():
        theirs, their_generator = run_oracle(oracle, x, begin, getattr(sampler, "eta", None))
    ours, our_generator = run_ours(sampler, x, plan)
    assert worst(ours, theirs) < 1e-10
    assert torch.equal(our_generator.get_state(), their_generator.get_state())


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", SETTINGS)
def test_exact_at_every_length(name, num_steps):
    check_exact(SETTINGS[name], KOLORS, num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [4, 25])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_exact_in_every_spacing(name, schedule, num_steps):
    check_exact(SETTINGS[name], SCHEDULES[schedule], num_steps=num_steps)


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpmpp-2m"])
def test_exact_with_linear_betas_and_no_offset(name):
    config = ScheduleConfig(1000, 0.0001, 0.02, "linear", "leading", 0)
    check_exact(SETTINGS[name], config, num_steps=20)


@pytest.mark.parametrize("num_steps", [5, 14, 15])
@pytest.mark.parametrize(("order", "stochastic"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_exact_in_every_setting_of_multistep(order, stochastic, num_steps):
    """Below and above 15 steps, where `lower_order_final` ceases to matter."""
    switches = itertools.product(
        (False, True), ("midpoint", "heun"), (False, True), (False, True), ("zero", "sigma_min")
    )
    for karras, solver_type, lower, euler, final in switches:
        sampler = DPMSolverPP(order, karras, stochastic, solver_type, lower, euler, final)
        first_order_end = euler or order == 1 or (lower and num_steps < 15)
        if karras and final == "sigma_min" and not first_order_end and (order == 3 or solver_type == "heun"):
            continue  # the oracle's last step, of length 0, gives NaN: see below
        check_exact(sampler, KOLORS, num_steps=num_steps)


@pytest.mark.parametrize(("order", "solver_type"), [(2, "heun"), (3, "midpoint")])
def test_a_last_step_of_length_zero_leaves_the_latents_alone(order, solver_type):
    """Karras levels end at sigma_min; with sigma_min once more, the oracle divides 0 by 0."""
    sampler = DPMSolverPP(order, karras=True, solver_type=solver_type, final_sigmas_type="sigma_min")
    oracle, plan = make_oracle(sampler), sampler.plan(NoiseSchedule(KOLORS), 20)
    oracle.set_timesteps(20)
    lift(oracle, plan)
    with in_double():
        theirs, _ = run_oracle(oracle, latents_like(0))
    ours, _ = run_ours(sampler, latents_like(0), plan)
    assert theirs[-1].isnan().all()
    assert worst(ours[:-1], theirs[:-1]) < 1e-10
    assert torch.equal(ours[-1], ours[-2])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 25])
@pytest.mark.parametrize(("order", "stochastic"), [(1, False), (2, False), (1, True), (2, True)])
def test_edm_ends_no_noisier_than_it_was(order, stochastic, num_steps):
    """In fp32 its last level is a little below sigma_min, which comes again; the way back up has no real length."""
    sampler = EDMDPMSolverPP(order=order, stochastic=stochastic, final_sigmas_type="sigma_min")
    oracle, plan = make_oracle(sampler), sampler.plan(NoiseSchedule(KOLORS), num_steps)
    oracle.set_timesteps(num_steps)
    assert (plan.sigmas.diff() <= 0).all()
    torch.testing.assert_close(plan.sigmas, oracle.sigmas, rtol=1e-6, atol=0)
    theirs, _ = run_oracle(oracle, latents_like(0) * plan.initial_scale)
    ours, _ = run_ours(sampler, latents_like(0) * plan.initial_scale, plan)
    assert worst(ours, theirs) < 1e-5


def test_third_order_sde_is_refused():
    """The oracle has one, with a D_2 whose weight tends to -1 and not 0 as steps shrink: a sign is wrong."""
    h = torch.tensor(1e-3, dtype=torch.float64)
    oracle_weight = (1 - torch.exp(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5
    assert abs(oracle_weight + 1) < 1e-3
    with pytest.raises(ValueError, match=r"stochastic .* must be one of \(1, 2\)"):
        DPMSolverPP(order=3, stochastic=True)


CUSTOM = (1050, 900, 811, 640, 421, 250, 99, 12)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 7, 8])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpmpp-2s"])
def test_exact_through_custom_timesteps(name, count, spacing):
    check_exact(SETTINGS[name], replace(KOLORS, timestep_spacing=spacing), timesteps=list(CUSTOM[:count]))


@pytest.mark.parametrize(
    "sigmas",
    [
        [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.029, 0.0],
        [25.0, 3.0, 0.5],  # stops at a level above 0
        [80.0, 1.0, 0.01, 0.0],  # beyond either end of the table
    ],
)
def test_exact_through_custom_sigmas(sigmas):
    """Only diffusers' Euler takes them. It interpolates timesteps in fp32, hence the leave of one fp32 rounding."""
    oracle, plan = make_oracle(Euler()), Euler().plan(NoiseSchedule(KOLORS), sigmas=sigmas)
    oracle.set_timesteps(sigmas=sigmas)
    check_plan(oracle, plan, atol=6.2e-5)
    oracle.timesteps = plan.timesteps
    lift(oracle, plan)
    with in_double():
        theirs, _ = run_oracle(oracle, latents_like(0))
    ours, _ = run_ours(Euler(), latents_like(0), plan)
    assert worst(ours, theirs) < 1e-10


@pytest.mark.parametrize(("num_steps", "begin"), [(10, 1), (10, 4), (10, 9), (25, 8), (25, 15)])
@pytest.mark.parametrize("name", SETTINGS)
def test_exact_from_the_middle(name, num_steps, begin):
    """As diffusers' image-to-image pipelines begin: at timestep begin * order of the scheduler's list."""
    check_exact(SETTINGS[name], KOLORS, begin, num_steps=num_steps)


@pytest.mark.parametrize("begin", [0, 3, 9])
@pytest.mark.parametrize("name", SETTINGS)
def test_add_noise(name, begin):
    """The noised picture from which image-to-image begins."""
    sampler = SETTINGS[name]
    oracle, plan = make_oracle(sampler), sampler.plan(NoiseSchedule(KOLORS), 10)
    oracle.set_timesteps(10)
    lift(oracle, plan)
    if hasattr(oracle, "set_begin_index"):
        oracle.set_begin_index(begin * oracle.order)
    first = oracle.timesteps[begin * oracle.order :][:1]
    theirs = oracle.add_noise(latents_like(1), latents_like(2), first)
    ours = sampler.add_noise(latents_like(1), latents_like(2), plan.from_step(begin))
    assert worst([ours], [theirs]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [n for n in STEPS if n <= 50])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_shipped(name, num_steps, dtype):
    """Nothing lifted: what is left is the rounding of fp32 coefficients and, within a step, of fp32 latents.

    Over 100 steps the oracle's own rounding adds up to 1.0e-6 to 1.5e-6 in four settings (stochastic or third-order);
    there only the lifted oracle, in `test_exact_at_every_length`, is a measure.
    """
    sampler = SETTINGS[name]
    oracle, plan = make_oracle(sampler), sampler.plan(NoiseSchedule(KOLORS), num_steps)
    oracle.set_timesteps(num_steps)
    x = (latents_like(0) * plan.initial_scale).to(dtype)
    theirs, _ = run_oracle(oracle, x, eta=getattr(sampler, "eta", None))
    # The multistep oracle draws its noise in fp32, whatever the latents are.
    ours, _ = run_ours(sampler, x, plan, noise_dtype=torch.float32 if isinstance(sampler, DPMSolverPP) else None)
    assert worst(ours, theirs) < (1e-6 if dtype == torch.float64 else 1e-5)


def test_edm_plan():
    """Sigmas are equal bit for bit: both raise to the seventh power in fp32."""
    for num_steps in STEPS:
        oracle, plan = make_oracle(EDMDPMSolverPP()), EDMDPMSolverPP().plan(NoiseSchedule(KOLORS), num_steps)
        oracle.set_timesteps(num_steps)
        assert torch.equal(plan.sigmas, oracle.sigmas)
        torch.testing.assert_close(plan.timesteps, oracle.timesteps, rtol=0, atol=1e-6)
        assert plan.initial_scale == oracle.init_noise_sigma


@pytest.mark.parametrize("sampler", [Euler(), DPMSolverPP()])
def test_trailing_has_as_many_steps_as_asked_for(sampler):
    """At 15 of 1100 the oracle's list runs one past the end, to timestep -1."""
    config = SCHEDULES["kolors-trailing"]
    oracle, plan = make_oracle(sampler, config), sampler.plan(NoiseSchedule(config), 15)
    oracle.set_timesteps(15)
    assert oracle.timesteps[-1] == -1
    assert torch.equal(plan.timesteps, oracle.timesteps[:-1])
