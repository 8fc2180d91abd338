"""What records gradients: networks and one prediction do, calls of the pipeline do not, offloaded networks cannot."""

from copy import deepcopy
from dataclasses import dataclass, field, replace

import pytest
import torch

from kolors_ref import KolorsPipeline
from kolors_ref.sampling import Euler
from kolors_ref.sampling.protocol import Step

SIZES = {"height": 64, "width": 64, "num_inference_steps": 3}


def context_of(unet):
    """Random text and sizes, prepared."""
    noise = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    config = unet.config
    return unet.prepare(noise(1, 3, config.text_dim), noise(1, config.pooled_dim), torch.full((1, 6), 64.0))


def test_the_networks_record(small_pipe):
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    small_pipe.unet(x, 500, context_of(small_pipe.unet)).square().sum().backward()
    assert x.grad.abs().sum() > 0
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    small_pipe.vae.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


def test_the_pipeline_does_not(small_pipe):
    denoising = small_pipe.denoise("a cat", **SIZES)
    latents = denoising.latents.requires_grad_()
    for step in replace(denoising, latents=latents):
        assert not step.latents.requires_grad
        assert torch.is_grad_enabled()
    assert not small_pipe.decode(step.latents, "pt").requires_grad


@dataclass(frozen=True)
class Guided(Euler):
    """Euler's method that looks at the gradient of a loss of the denoised picture (Bansal et al. 2023, section 3)."""

    gradients: list = field(default_factory=list)

    def run(self, predict, latents, plan, draw_noise):
        x, sigmas = latents, plan.sigmas.tolist()
        for i in range(plan.begin, plan.num_steps):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                noise_pred = predict(leaf / (sigmas[i] ** 2 + 1) ** 0.5, plan.timesteps[i])
                denoised = leaf - sigmas[i] * noise_pred
                [gradient] = torch.autograd.grad(denoised.square().sum(), leaf)
            self.gradients.append(gradient)
            x = x + (sigmas[i + 1] - sigmas[i]) * noise_pred.detach()
            yield Step(i, plan.timesteps[i], sigmas[i], x, noise_pred.detach())


def test_a_sampler_can_be_led_by_a_gradient(small_pipe):
    """It is that of the whole prediction, the UNet's share included: compared with finite differences."""
    pipe = KolorsPipeline(**{name: part for name, part in vars(small_pipe).items() if name != "ip_adapters"})
    pipe.unet = deepcopy(pipe.unet).double()
    sampler = Guided()
    denoising = pipe.denoise("a cat", sampler=sampler, guidance_scale=3.0, **SIZES)
    steps = list(denoising)
    start, sigma, timestep = denoising.latents.double(), denoising.plan.sigmas[0].item(), denoising.plan.timesteps[0]
    loss = lambda x: (x - sigma * denoising.predict(x / (sigma**2 + 1) ** 0.5, timestep)).square().sum()
    direction = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        slope = (loss(start + 1e-4 * direction) - loss(start - 1e-4 * direction)) / 2e-4
    assert len(steps) == len(sampler.gradients) == 3
    assert (sampler.gradients[0] * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("offload", ["model", "stream"])
def test_weights_that_leave_refuse(small_checkpoint, offload):
    """They may be gone when gradients are computed, which would be NaN."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint, offload=offload)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match='gradients need weights that stay; load with offload="none"'):
        pipe.unet(x, 500, context_of(pipe.unet))
