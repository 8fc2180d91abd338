"""The denoising loop of some pictures: where the UNet, the sampler and guidance meet."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_finite
from .models.unet import Context, UNet
from .sampling import Plan, Sampler, Step
from .sampling.guidance import classifier_free_guidance, is_guided
from .sampling.protocol import DrawNoise


@dataclass(frozen=True)
class Denoising:
    """The denoising loop, ready to run: iterating over it removes the noise, one `Step` at a time.

    Its length is the number of steps to run. It can be run several times, which differ only in the noise that the
    sampler draws. The text's keys and values are already in the contexts: a LoRA loaded or unloaded later affects only
    the rest. Iterating records no gradients unless the sampler turns them on; `predict` records them as any network
    does. Iterating raises FloatingPointError if a step gives NaN or infinity.

    Attributes:
        contexts: what each call of the UNet is conditioned on: one call for all pictures, or one per picture.
        plan: the sampler's steps; None if none is to be run.
        latents: where it starts, (B, 4, H/8, W/8).
        guidance_scale: 1 if contexts have one row per picture, above 1 if two, those of the negative prompts first.
        guidance_interval: see `Request`.
    """

    unet: UNet
    contexts: list[Context]
    sampler: Sampler
    plan: Plan | None
    latents: Tensor
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    draw_noise: DrawNoise

    def __len__(self) -> int:
        return 0 if self.plan is None else self.plan.num_steps - self.plan.begin

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        if self.plan is None:
            return
        for step in self.sampler.run(self.predict, self.latents, self.plan, self.draw_noise):
            check_finite(step.latents, f"step {step.index} of the denoising loop (the UNet)")
            yield step

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predicts the guided noise in latents (B, 4, H/8, W/8), which the sampler has scaled for the network."""
        parts = zip(latents.split(len(latents) // len(self.contexts)), self.contexts, strict=True)
        return torch.cat([self.predict_part(part, timestep, context) for part, context in parts])

    def predict_part(self, latents: Tensor, timestep: Tensor, context: Context) -> Tensor:
        """Predicts the guided noise in the latents of one call of the UNet."""
        inputs = latents.to(self.unet.conv_in.weight.dtype)
        if self.guidance_scale <= 1:
            return self.unet(inputs, timestep, context).to(latents.dtype)
        if self.guidance_interval and not is_guided(timestep, self.plan.timesteps, self.guidance_interval):
            return self.unet(inputs, timestep, context[len(inputs) :]).to(latents.dtype)
        noise_pred = self.unet(torch.cat([inputs, inputs]), timestep, context).to(latents.dtype)
        return classifier_free_guidance(noise_pred, self.guidance_scale)
