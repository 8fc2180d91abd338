"""The arguments of a call: what is taken, and one sentence of the standard kind for what is not."""

import dataclasses
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_ref import KolorsPipeline, Request, TextEmbeddings
from kolors_ref.models.unet import UNet
from kolors_ref.sampling import Euler, EulerAncestral

SIZES = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}


def embeddings(n=1, length=4, size=16, **changes):
    """Random embeddings for n prompts."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        "sequence": torch.randn(n, length, size, generator=generator),
        "pooled": torch.randn(n, size, generator=generator),
    }
    return TextEmbeddings(**{**parts, **changes})


def expect(error, function, mentions):
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert mentions in message, message


NO_NUMBERS = ["1", b"1", [1], (1, 2), {}, object(), True, 1j]
NO_COUNTS = [*NO_NUMBERS, 2.0, 2.5, math.nan, torch.tensor(2)]
WRONG_TYPES = {
    "prompt": [3, 2.5, b"cat", {"a": 1}, ["cat", 3], [None], [["cat"]], object(), True],
    "negative_prompt": [3, 2.5, b"cat", {"a": 1}, [3], [None], object(), True],
    "height": NO_COUNTS,
    "width": NO_COUNTS,
    "num_inference_steps": [*NO_COUNTS, None],
    "guidance_scale": [*NO_NUMBERS, [None]],
    "sampler": [3, 2.5, b"euler", ["euler"], {}, object(), True, Euler],
    "num_images_per_prompt": [*NO_COUNTS, None],
    "generator": [3, 2.5, "seed", [3], [None], {}, object(), True, torch.Generator],
    "strength": [*NO_NUMBERS, None],
    "latents": [3, "noise", [[0.0]], np.zeros((1, 4, 4, 4)), object(), True],
    "image": [3, "picture.png", b"", {}, object(), True, [3]],
    "original_size": [3, "64", [64], (64, 64, 64), ("64", "64"), (None, 64), {}, object(), True, (True, 64)],
    "crops_coords_top_left": [3, "64", [64], (64, 64, 64), ("64", "64"), (None, 64), {}, object(), True],
    "target_size": [3, "64", [64], (64, 64, 64), ("64", "64"), (None, 64), {}, object(), True],
    "negative_original_size": [3, "64", [64], (64, 64, 64), ("64", "64"), {}, object(), True],
    "negative_crops_coords_top_left": [3, "64", [64], (64, 64, 64), ("64", "64"), {}, object(), True],
    "negative_target_size": [3, "64", [64], (64, 64, 64), ("64", "64"), {}, object(), True],
    "prompt_embeds": [3, "cat", torch.zeros(1, 4, 16), (1, 2), {}, object(), True],
    "negative_prompt_embeds": [3, "cat", torch.zeros(1, 4, 16), (1, 2), {}, object(), True],
    "max_sequence_length": [*NO_COUNTS, None],
    "ip_adapter_scale": [None, "1", object(), True],
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_wrong_types(small_pipe, field):
    """Every value of a wrong type is a TypeError that names the argument."""
    for value in WRONG_TYPES[field]:
        arguments = {"prompt": None if field == "prompt_embeds" else "a cat", **SIZES, field: value}
        expect(TypeError, partial(small_pipe, **arguments), "picture" if field == "image" else field)


def test_every_field_is_tested():
    """A new field of `Request` must find its place in the table above, or its own tests."""
    elsewhere = {"timesteps", "sigmas", "ip_adapter_image", "ip_adapter_mask", "ip_adapter_embeds", "guidance_interval"}
    assert {field.name for field in dataclasses.fields(Request)} == set(WRONG_TYPES) | elsewhere


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
@pytest.mark.parametrize("value", [3, "many", ["a"], [None], [[1.0, 0.0]], [], [math.nan], [math.inf, 1.0, 0.0], {}])
def test_custom_levels_that_are_none(small_pipe, name, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        small_pipe("a cat", **{**SIZES, name: value})
    assert "\n" not in str(caught.value)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


WRONG_VALUES = [
    ({"prompt": None}, "neither prompt nor prompt_embeds"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt_embeds": embeddings()}, "both prompt and prompt_embeds"),
    ({"negative_prompt": "ugly", "negative_prompt_embeds": embeddings()}, "both negative_prompt and negative_prompt"),
    ({"negative_prompt_embeds": embeddings(2)}, "negative_prompt_embeds is for 2 prompts"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 prompts, but prompt has 1"),
    ({"negative_prompt": []}, "negative_prompt is an empty list"),
    ({"prompt": "\ud800"}, "valid Unicode"),
    ({"height": 0}, "height is 0"),
    ({"height": 33}, "height is 33"),
    ({"width": -8}, "width is -8"),
    ({"width": 8200}, "width is 8200"),
    ({"height": 8 * 10**30}, "height is 8000"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"num_inference_steps": 10**30}, "steps"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"guidance_scale": -math.inf}, "guidance_scale is -inf"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"sampler": "eula"}, "'euler'"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000"),
    ({"max_sequence_length": 0}, "max_sequence_length is 0"),
    ({"max_sequence_length": 1}, "at least 2"),
    ({"max_sequence_length": 10**9}, "max_sequence_length is 1000000000"),
    ({"strength": -0.01}, "strength is -0.01"),
    ({"strength": 1.01}, "strength is 1.01"),
    ({"strength": math.nan}, "strength is nan"),
    ({"generator": generators(2)}, "generator is a list of 2, but 1 pictures"),
    ({"generator": []}, "generator is a list of 0"),
    ({"prompt": ["a", "b"], "num_images_per_prompt": 2, "generator": generators(2)}, "but 4 pictures"),
    ({"latents": torch.zeros(1, 4, 4, 5)}, "latents has shape (1, 4, 4, 5)"),
    ({"latents": torch.zeros(2, 4, 4, 4)}, "latents has shape (2, 4, 4, 4)"),
    ({"latents": torch.zeros(4, 4, 4)}, "latents has shape (4, 4, 4)"),
    ({"latents": torch.full((1, 4, 4, 4), math.nan)}, "latents holds NaN or infinity"),
    ({"latents": torch.zeros(1, 4, 4, 4), "image": Image.new("RGB", (32, 32))}, "both image and latents"),
    ({"image": []}, "no picture"),
    ({"image": [Image.new("RGB", (32, 32))] * 2}, "image holds 2 pictures"),
    ({"original_size": (math.nan, 64)}, "original_size is nan"),
    ({"target_size": (64, math.inf)}, "target_size is inf"),
    ({"negative_crops_coords_top_left": (math.inf, 64)}, "negative_crops_coords_top_left is inf"),
    ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
    ({"output_type": None}, "output_type is None"),
]


@pytest.mark.parametrize(
    ("arguments", "mentions"), WRONG_VALUES, ids=lambda value: "_".join(value) if isinstance(value, dict) else value
)
def test_wrong_values(small_pipe, arguments, mentions):
    """Every wrong value is a ValueError that says which."""
    expect(ValueError, lambda: small_pipe(**{"prompt": "a cat", **SIZES, **arguments}), mentions)


def test_a_picture_that_is_too_large(small_pipe):
    """Its own size counts where no other is given."""
    long = Image.new("RGB", (8, 8200))
    expect(ValueError, lambda: small_pipe("a cat", image=long, num_inference_steps=1), "height is 8200")


@pytest.mark.parametrize(
    ("embeds", "mentions"),
    [
        (embeddings(size=24), "24"),
        (embeddings(sequence=torch.zeros(1, 4)), "(1, 4)"),
        (embeddings(pooled=torch.zeros(2, 16)), "(2, 16)"),
        (embeddings(pooled=torch.zeros(1, 24)), "16 wide, and 24 where they are pooled, but this UNet takes 16 and 16"),
        (embeddings(pooled=torch.zeros(1, 4, 16)), "(1, 4, 16)"),
        (embeddings(key_bias=torch.zeros(1, 5)), "(1, 5)"),
        (embeddings(n=0), "at least one"),
        (embeddings(sequence=torch.full((1, 4, 16), math.nan)), "holds NaN or infinity"),
        (embeddings(pooled=torch.full((1, 16), math.inf)), "holds NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_do_not_fit(small_pipe, name, embeds, mentions):
    """In shape or numbers; the UNet is not blamed for what it was given."""
    arguments = {"prompt_embeds": embeddings(), **SIZES, name: embeds}
    expect(ValueError, lambda: small_pipe(**arguments), mentions)


def test_the_pooled_embedding_may_be_of_another_width(small_pipe):
    """As where two text encoders are at work."""
    config = replace(small_pipe.unet.config, pooled_dim=12)
    parts = {**vars(small_pipe), "unet": UNet(config).requires_grad_(False)}
    parts.pop("ip_adapters")
    pooled = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    embeds = embeddings(pooled=pooled)
    pictures = KolorsPipeline(**parts)(prompt_embeds=embeds, negative_prompt_embeds=embeds, **SIZES)
    assert pictures.isfinite().all()


def test_embeddings_that_are_no_tensors(small_pipe):
    for change in ({"sequence": None}, {"pooled": [1.0]}, {"key_bias": 3.0}):
        expect(TypeError, lambda c=change: small_pipe(prompt_embeds=embeddings(**c), **SIZES), "prompt_embeds")


def test_embeddings_of_another_format(small_pipe):
    """Are cast to what the UNet computes in."""
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    single = small_pipe(prompt_embeds=embeddings(), latents=noise, **SIZES)
    double = small_pipe(prompt_embeds=embeddings().to(torch.float64), latents=noise, **SIZES)
    assert torch.equal(single, double)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ("a", "b"), "negative_prompt": ("c", "d")},
        {"negative_prompt": None},
        {"guidance_scale": 7},
        {"guidance_scale": 0},
        {"guidance_scale": -1.0},
        {"sampler": EulerAncestral(), "generator": tuple(generators(1))},
        {"original_size": [64, 64], "negative_target_size": (512.0, 512)},
        {"timesteps": np.array([900.0, 100.0]), "sampler": "euler"},
        {"sigmas": [10.0, 1.0, 0.0], "sampler": "euler", "num_inference_steps": "not looked at"},
        {"latents": torch.zeros(1, 4, 4, 4, dtype=torch.float64)},
        {"image": Image.effect_noise((40, 50), 60), "strength": 0},
        {"max_sequence_length": 2},
        {"max_sequence_length": 5000},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_what_is_taken(small_pipe, arguments):
    """Other spellings of right values, and values at the bounds."""
    pixels = small_pipe(**{"prompt": "a cat", **SIZES, **arguments})
    assert pixels.shape == (2 if isinstance(arguments.get("prompt"), tuple) else 1, 3, 32, 32)
    assert pixels.isfinite().all()
    assert pixels.std() > 0.01


def test_names_that_are_none(small_pipe):
    with pytest.raises(TypeError, match="num_steps"):
        small_pipe("a cat", num_steps=3)


@pytest.mark.parametrize(
    ("prompts", "per_prompt", "given", "starts"),
    [
        (1, 3, 1, [0, 0, 0]),
        (1, 2, 2, [0, 1]),
        (4, 1, 2, [0, 1, 0, 1]),
        (2, 2, 2, [0, 0, 1, 1]),
        (2, 3, 6, [0, 1, 2, 3, 4, 5]),
        (2, 3, 3, [0, 1, 2, 0, 1, 2]),
    ],
)
def test_which_picture_each_starts_from(prompts, per_prompt, given, starts):
    """One for all, one for each prompt, or in turn."""
    assert Request(["a cat"] * prompts, num_images_per_prompt=per_prompt).starts(given) == starts
