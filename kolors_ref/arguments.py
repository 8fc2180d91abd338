"""Checks of what a caller gives the pipeline: each error is one sentence."""

from collections.abc import Container, Sequence
from itertools import chain, count
from numbers import Integral, Real

import torch
from torch import Tensor

from .images import OUTPUT_TYPES
from .sampling.noise import Generators
from .text_layout import TextEmbeddings

MAX_SIDE = 8192
"""The largest height or width, in pixels: eight times what Kolors was trained for, and 64 times the area."""

LARGEST = torch.finfo(torch.float32).max
MAX_IMAGES = 1024
"""The most pictures per prompt in one call: all of them are in memory at once."""
MAX_TOKENS = 32768
"""The longest prompt: the positions that ChatGLM3 knows."""

Size = tuple[int, int]


def free_name(stem: str, taken: Container[str]) -> str:
    """Returns `style`, or `style-2`, `style-3` ... if that is taken."""
    candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(name for name in candidates if name not in taken)


def check_count(name: str, value: int, most: int | None = None) -> None:
    """Raises unless value is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}; the most is {most}")


def check_number(name: str, value: float, least: float = -LARGEST, most: float = LARGEST) -> None:
    """Raises unless value is a finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value <= most:
        bounds = f" from {least:g} to {most:g}" if most < LARGEST else ""
        raise ValueError(f"{name} is {value}; it must be a finite number{bounds}")


def check_interval(name: str, value: tuple[float, float]) -> None:
    """Raises unless value is a pair of fractions, 0 <= start < end <= 1."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (start, end) of numbers from 0 to 1, not {value!r}")
    for bound in value:
        check_number(name, bound, 0.0, 1.0)
    if value[0] >= value[1]:
        raise ValueError(f"{name} is {tuple(value)}; its start must be below its end")


def check_side(name: str, value: int, multiple: int = 8) -> int:
    """Returns value; raises unless it is a possible height or width of a picture, in pixels."""
    check_count(name, value)
    if value % multiple:
        near = max(value // multiple, 1) * multiple
        raise ValueError(f"{name} is {value} pixels; it must be a multiple of {multiple}, such as {near}")
    if value > MAX_SIDE:
        raise ValueError(f"{name} is {value} pixels; the most is {MAX_SIDE}")
    return value


def check_size(name: str, value: Size) -> Size:
    """Returns value as a tuple; raises unless it is a pair of numbers, in pixels."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of numbers in pixels, not {value!r}")
    for side in value:
        check_number(name, side)
    return tuple(value)


def check_output_type(output_type: str) -> None:
    """Raises unless the pipeline can give pictures of this kind."""
    if output_type not in (*OUTPUT_TYPES, "latent"):
        raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join((*OUTPUT_TYPES, 'latent'))}")


def check_prompts(prompt: str | Sequence[str] | None, embeds: TextEmbeddings | None) -> list[str] | None:
    """Returns the prompts as a list, None where embeddings are given instead."""
    if embeds is not None:
        if prompt is not None:
            raise ValueError("both prompt and prompt_embeds are given; give one of them")
        check_embeddings("prompt_embeds", embeds)
        return None
    if prompt is None:
        raise ValueError("neither prompt nor prompt_embeds is given; give one of them")
    return as_prompts("prompt", prompt)


def check_negative_prompts(
    negative: str | Sequence[str] | None, embeds: TextEmbeddings | None, count: int
) -> list[str] | None:
    """Returns the negative prompts as a list of `count`, None where there are none or embeddings are given instead."""
    if embeds is not None:
        if negative:
            raise ValueError("both negative_prompt and negative_prompt_embeds are given; give one of them")
        check_embeddings("negative_prompt_embeds", embeds)
        if len(embeds.pooled) != count:
            raise ValueError(f"negative_prompt_embeds is for {len(embeds.pooled)} prompts, but there are {count}")
        return None
    if negative is None:
        return None
    prompts = as_prompts("negative_prompt", negative)
    if isinstance(negative, str):
        return prompts * count
    if len(prompts) != count:
        raise ValueError(f"negative_prompt has {len(prompts)} prompts, but prompt has {count}; give one for each")
    return prompts


def as_prompts(name: str, prompt: str | Sequence[str]) -> list[str]:
    """Returns one or several prompts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"{name} must be a string or a list of strings, not {prompt!r}")
    if not prompts:
        raise ValueError(f"{name} is an empty list; give at least one prompt")
    return list(prompts)


def check_embeddings(name: str, embeds: TextEmbeddings) -> None:
    """Raises unless embeds are embeddings whose parts fit together."""
    if not isinstance(embeds, TextEmbeddings):
        raise TypeError(f"{name} must be what encode_prompt gives, not {type(embeds).__name__}")
    if not all(
        isinstance(part, Tensor)
        for part in (embeds.sequence, embeds.pooled, *([] if embeds.key_bias is None else [embeds.key_bias]))
    ):
        raise TypeError(f"{name} must hold tensors, as what encode_prompt gives does")
    if embeds.sequence.ndim != 3 or embeds.pooled.ndim != 2 or len(embeds.pooled) != len(embeds.sequence):
        shapes = f"{tuple(embeds.sequence.shape)} and {tuple(embeds.pooled.shape)}"
        raise ValueError(f"{name} has a sequence and a pooled embedding of shapes {shapes}; must be (B, L, D), (B, E)")
    if embeds.key_bias is not None and embeds.key_bias.shape != embeds.sequence.shape[:2]:
        shapes = f"{tuple(embeds.key_bias.shape)} for a sequence of shape {tuple(embeds.sequence.shape)}"
        raise ValueError(f"{name} has a key_bias of shape {shapes}; must be (B, L) for (B, L, D)")
    if not embeds.sequence.numel():
        raise ValueError(f"{name} is empty; give at least one prompt")
    if not all(torch.isfinite(part).all() for part in (embeds.sequence, embeds.pooled)):
        raise ValueError(f"{name} holds NaN or infinity; check what computed it")


def check_generators(generator: Generators, count: int) -> None:
    """Raises unless generator is None, one generator or one for each of `count` pictures."""
    generators = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, not {type(one).__name__}")
    if isinstance(generator, list | tuple) and len(generator) != count:
        raise ValueError(f"generator is a list of {len(generator)}, but {count} pictures are asked for")


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns latents; raises unless they are a finite tensor of this shape."""
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor, not {type(latents).__name__}")
    if latents.shape != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; these prompts and this size need {shape}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents holds NaN or infinity; it must be unit noise")
    return latents


def check_finite(tensor: Tensor, stage: str) -> Tensor:
    """Raises FloatingPointError, naming the stage, if a tensor holds NaN or infinity; gives it back otherwise."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"{stage} gave NaN or infinity; try another dtype, float32 being the safest")
    return tensor
