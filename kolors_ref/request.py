"""What a caller asks a pipeline for: the arguments of a call, in one place and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    MAX_IMAGES,
    MAX_TOKENS,
    Size,
    as_prompts,
    check_count,
    check_generators,
    check_interval,
    check_negative_prompts,
    check_number,
    check_prompts,
    check_side,
    check_size,
)
from .images import Pictures
from .sampling import Sampler, get_sampler
from .sampling.noise import Generators
from .text_layout import TextEmbeddings
from .tokenizer import MAX_LENGTH


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `KolorsPipeline.__call__` and `KolorsPipeline.denoise`.

    Attributes:
        prompt: one prompt or a list of them.
        negative_prompt: what to steer away from; one for all or one per prompt. None stands for embeddings of zeros or
            for "", as the checkpoint says.
        height, width: in pixels, multiples of 8; the size the UNet was trained for if None.
        num_inference_steps: of the sampler; ignored if timesteps or sigmas are given.
        guidance_scale: of classifier-free guidance; at 1 or below only the prompt's branch is computed. None is what
            the checkpoint asks for, 6.5 if it does not say.
        sampler: a name (see `sampling.SAMPLERS`) or an instance; the one that the checkpoint asks for if None.
        num_images_per_prompt: pictures of the same prompt come one after the other.
        generator: one for all pictures, or a list with one for each; None is torch's global generator.
        latents: unit noise (N, 4, H/8, W/8) to start from instead of drawing it.
        image: pictures to start from (image-to-image): one for all, one per prompt, or a number that divides the
            number of prompts (else of pictures to make), which then take them in turn. They are resized to height and
            width, and set the size if these are None.
        strength: how much of the image is redone, from 0 (nothing) to 1 (from the first noise level of text-to-image).
        ip_adapter_image: reference pictures, for all prompts. With one IP-Adapter loaded a picture or a list of them,
            which it sees all at once; with several a list with an entry for each, in order of loading: a picture, a
            list of them, or None.
        ip_adapter_scale: weight of the reference pictures, 1 as trained, 0 for none: a number, or a dict with numbers
            for parts of the UNet (see `image_prompts.layer_scales`); for all adapters, or a list with an entry for
            each. Where an adapter's pictures have masks, its entry may be a list with one for each picture.
        ip_adapter_mask: where in the picture each reference picture counts (see `image_prompts.read_masks`): for one
            adapter as many masks as pictures, for several a list of such or None.
        ip_adapter_embeds: what `encode_image` gave, in place of ip_adapter_image.
        original_size, crops_coords_top_left, target_size: (h, w) in pixels, conditions of the UNet (Podell et al. 2023,
            section 2.2); the sizes are height and width if None, and the native ones where these are None too. The
            negative_ ones are for the negative branch, which shares the positive ones if none of them is given; if any
            is, an omitted crop is (0, 0).
        timesteps, sigmas: custom ones, in place of num_inference_steps, where the sampler takes them.
        prompt_embeds, negative_prompt_embeds: embeddings in place of prompts, one row per prompt.
        max_sequence_length: tokens per prompt, prefix included; the rest is cut off.
        guidance_interval: the steps to guide, from the first fraction of all steps up to the second: (0.2, 0.8) guides
            steps 5 to 19 of 25, counted from 0; the others compute only the prompt's branch. (The second prediction of
            a Heun step counts as the next step's.) None is all of them. Limiting guidance to the
            middle can improve pictures (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves
            Sample and Distribution Quality in Diffusion Models").

    Raises:
        TypeError, ValueError: an argument is wrong for any model.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    sampler: str | Sampler | None = None
    num_images_per_prompt: int = 1
    generator: Generators = None
    latents: Tensor | None = None
    image: Pictures | None = None
    strength: float = 0.8
    ip_adapter_image: Pictures | Sequence[Pictures | None] | None = None
    ip_adapter_scale: float | Mapping[str, Any] | Sequence[Any] = 1.0
    ip_adapter_mask: Any = None
    ip_adapter_embeds: Tensor | Sequence[Tensor | None] | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size | None = None
    negative_target_size: Size | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    prompt_embeds: TextEmbeddings | None = None
    negative_prompt_embeds: TextEmbeddings | None = None
    max_sequence_length: int = MAX_LENGTH
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_prompts(self.prompt, self.prompt_embeds)
        check_negative_prompts(self.negative_prompt, self.negative_prompt_embeds, self.num_prompts)
        if self.timesteps is None and self.sigmas is None:
            check_count("num_inference_steps", self.num_inference_steps)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_side(name, getattr(self, name))
        if self.sampler is not None:
            get_sampler(self.sampler)
        check_count("max_sequence_length", self.max_sequence_length, MAX_TOKENS)
        check_count("num_images_per_prompt", self.num_images_per_prompt, MAX_IMAGES)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale)
        if self.guidance_interval is not None:
            check_interval("guidance_interval", self.guidance_interval)
        check_number("strength", self.strength, 0.0, 1.0)
        check_generators(self.generator, self.num_images)
        if self.image is not None and self.latents is not None:
            raise ValueError("both image and latents are given; give one of them to start from")
        self._check_image_prompts()

    @property
    def prompts(self) -> list[str] | None:
        """The prompts as a list; None where embeddings are given instead."""
        return None if self.prompt is None else as_prompts("prompt", self.prompt)

    @property
    def negative_prompts(self) -> list[str] | None:
        """One negative prompt per prompt; None where there are none or embeddings are given instead."""
        return check_negative_prompts(self.negative_prompt, self.negative_prompt_embeds, self.num_prompts)

    @property
    def num_prompts(self) -> int:
        """How many prompts, or rows of given embeddings."""
        return len(self.prompt_embeds.pooled if self.prompts is None else self.prompts)

    @property
    def num_images(self) -> int:
        """How many pictures come out."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether there is a negative branch; the guidance scale must be known."""
        return self.guidance_scale > 1

    def starts(self, given: int) -> list[int]:
        """Returns, for every picture to make, the index of the picture that it starts from, among the `given` ones.

        Pictures of the same prompt start from the same one if `given` divides the number of prompts.
        """
        if self.num_prompts % given == 0:
            return [number // self.num_images_per_prompt % given for number in range(self.num_images)]
        if self.num_images % given == 0:
            return [number % given for number in range(self.num_images)]
        raise ValueError(f"image holds {given} pictures; that must divide the {self.num_images} pictures to make")

    def _check_image_prompts(self) -> None:
        if not isinstance(self.ip_adapter_scale, Mapping | list | tuple):
            check_number("ip_adapter_scale", self.ip_adapter_scale)
        if self.ip_adapter_image is not None and self.ip_adapter_embeds is not None:
            raise ValueError("both ip_adapter_image and ip_adapter_embeds are given; give one of them")
        if self.ip_adapter_mask is not None and self.ip_adapter_image is None and self.ip_adapter_embeds is None:
            raise ValueError("ip_adapter_mask is given without a reference picture; give ip_adapter_image as well")

    def sizes(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns the size conditions of the negative branch and of the positive one, each (6,), for this size."""
        names = ("original_size", "crops_coords_top_left", "target_size")
        defaults = ((height, width), (0, 0), (height, width))
        positive = check_sizes(names, [getattr(self, name) for name in names], defaults)
        names = tuple(f"negative_{name}" for name in names)
        given = [getattr(self, name) for name in names]
        if all(value is None for value in given):
            return torch.tensor(positive), torch.tensor(positive)
        defaults = (positive[:2], (0, 0), positive[4:])
        return torch.tensor(check_sizes(names, given, defaults)), torch.tensor(positive)


def check_sizes(names: Sequence[str], given: Sequence[Size | None], defaults: Sequence[Size]) -> list[float]:
    """Returns three pairs of pixels one after the other, a default for each that is None."""
    pairs = [default if pair is None else pair for pair, default in zip(given, defaults, strict=True)]
    return [float(side) for name, pair in zip(names, pairs, strict=True) for side in check_size(name, pair)]
