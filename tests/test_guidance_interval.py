"""Guidance in a part of the steps: which are guided, what the others cost, and that they are what guidance 1 gives."""

from itertools import pairwise

import pytest
import torch
from PIL import Image
from test_image_prompts import randomised
from test_loading import draw

from kolors_ref.config import UNetConfig
from kolors_ref.models.unet import KeyValue, UNet
from kolors_ref.sampling.guidance import is_guided

SIZES = {"height": 32, "width": 32}


def rows_seen(pipe, monkeypatch, **options):
    """The rows of every call of the UNet."""
    rows, forward = [], pipe.unet.forward
    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", lambda x, t, c: rows.append(len(x)) or forward(x, t, c))
        draw(pipe, **options)
    return rows


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance_interval": None}, [2, 2, 2, 2]),
        ({"guidance_interval": (0, 1)}, [2, 2, 2, 2]),
        ({"guidance_interval": (0.25, 0.75)}, [1, 2, 2, 1]),
        ({"guidance_interval": [0.3, 1.0]}, [1, 1, 2, 2]),
        ({"guidance_interval": (0.26, 0.49)}, [1, 1, 1, 1]),
        ({"guidance_interval": (0.25, 0.75), "sampler": "dpmpp-2m-karras"}, [1, 2, 2, 1]),
        ({"guidance_interval": (0.25, 0.75), "sampler": "edm-dpmpp-2m"}, [1, 2, 2, 1]),
        ({"guidance_interval": (0.25, 0.75), "sampler": "heun"}, [1, 2, 2, 2, 2, 1, 1]),
        ({"guidance_interval": (0.25, 0.75), "prompt": ["a cat", "a dog"]}, [1, 1, 2, 2, 2, 2, 1, 1]),
        ({"guidance_interval": (0.25, 0.75), "guidance_scale": 1.0}, [1, 1, 1, 1]),
        ({"guidance_interval": (0.25, 0.75), "image": Image.new("RGB", (32, 32)), "strength": 0.5}, [2, 1]),
    ],
)
def test_which_steps_are_guided(small_pipe, monkeypatch, options, expected):
    """A step counts by its place in the whole plan, a second prediction by the level it is made at.

    Two pictures are computed one after the other in fp32.
    """
    assert rows_seen(small_pipe, monkeypatch, num_inference_steps=4, **options) == expected


@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a lighthouse in fog, and many ships at sea"]])
def test_the_others_are_those_of_guidance_1(small_pipe, prompts):
    """Inside the interval a prediction is the guided one, outside the one without negative prompts."""
    start = lambda **options: small_pipe.denoise(prompts, "ugly", num_inference_steps=4, **SIZES, **options)
    limited, guided, plain = start(guidance_interval=(0.5, 1)), start(), start(guidance_scale=1.0)
    latents = torch.randn(guided.latents.shape, generator=torch.Generator().manual_seed(0))
    for i, timestep in enumerate(limited.plan.timesteps):
        expected, other = (plain, guided) if i < 2 else (guided, plain)
        torch.testing.assert_close(
            limited.predict(latents, timestep), expected.predict(latents, timestep), atol=1e-4, rtol=1e-4
        )
        assert not torch.allclose(limited.predict(latents, timestep), other.predict(latents, timestep), atol=1e-2)


def test_off_by_default(small_pipe):
    """None and the whole range are the same picture, and a part is another."""
    assert torch.equal(draw(small_pipe, guidance_interval=(0.0, 1.0)), draw(small_pipe))
    assert not torch.allclose(draw(small_pipe, guidance_interval=(0.5, 1.0)), draw(small_pipe), atol=1e-3)


def test_every_prediction_is_in_one_part():
    """Intervals that meet share no prediction and leave none out."""
    timesteps = torch.linspace(1000, 100, 10)
    for timestep in timesteps:
        for bounds in ((0, 0.5, 1), (0, 0.1, 0.2, 1), (0, 1)):
            assert sum(is_guided(timestep, timesteps, pair) for pair in pairwise(bounds)) == 1


def test_rows_of_a_context():
    """A part of the batch sees its own keys, biases and weights, and what all of the batch shares."""
    config = UNetConfig(
        channels=(8, 16), transformer_depth=(0, 1), num_heads=(1, 2), layers_per_block=1, text_dim=12,
        cross_attention_dim=12, pooled_dim=12, size_embed_dim=4, norm_groups=4,
    )  # fmt: skip
    unet, generator = randomised(UNet(config)).double(), torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    context = unet.prepare(random(4, 6, 12), random(4, 12), random(4, 6).abs() * 100, random(4, 6))
    masks = [random(1, 1, 8, 1), random(4, 1, 8, 1), None, 0.5]
    masked = [KeyValue(random(4, 2, 3, 8), random(4, 2, 3, 8), weight=mask) for mask in masks]
    context = context.add([[seen] for seen in masked])
    latents = random(4, 4, 4, 8)
    whole = unet(latents, 500.0, context)
    for rows in (slice(2, None), slice(0, 2), slice(3, 4)):
        torch.testing.assert_close(unet(latents[rows], 500.0, context[rows]), whole[rows], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.5, TypeError, "must be a pair"),
        ("01", TypeError, "must be a pair"),
        ((0.1,), TypeError, "must be a pair"),
        ((0.1, 0.2, 0.3), TypeError, "must be a pair"),
        (("0", "1"), TypeError, "must be a number"),
        ((None, 1), TypeError, "must be a number"),
        ((True, 1), TypeError, "must be a number"),
        ((-0.1, 0.5), ValueError, "guidance_interval is -0.1"),
        ((0.1, 1.1), ValueError, "guidance_interval is 1.1"),
        ((0.0, float("nan")), ValueError, "guidance_interval is nan"),
        ((0.5, 0.5), ValueError, "its start must be below its end"),
        ((0.6, 0.5), ValueError, "its start must be below its end"),
    ],
)
def test_wrong_intervals(small_pipe, value, error, message):
    with pytest.raises(error, match=r"guidance_interval") as caught:
        draw(small_pipe, guidance_interval=value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
