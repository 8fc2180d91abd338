"""The picture of a prompt does not depend on what else is in the call: the same bits in fp32 and fp64."""

import pytest
import torch

from kolors_ref import KolorsPipeline

PROMPTS = ["a red cat on the roof of a very old house in the rain", "一座灯塔", "a dog"]
NEGATIVES = ["ugly", "", "a long list of everything that ought not to be seen in this picture, 模糊"]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def pipe(request, small_checkpoint):
    return KolorsPipeline.from_pretrained(small_checkpoint, dtype=request.param)


def draw(pipe, numbers, **options):
    """Pictures of some of the prompts, each from noise of its own."""
    noises = [torch.Generator().manual_seed(number) for number in numbers]
    sizes = {"height": 64, "width": 80, "num_inference_steps": 4, "output_type": "np"}
    lists = {
        name: [values[number] for number in numbers] for name, values in options.items() if isinstance(values, list)
    }
    prompts = [PROMPTS[number] for number in numbers]
    return pipe(prompts, generator=noises, **{**sizes, **options, **lists})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt": NEGATIVES},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.3, 0.8), "sampler": "euler-ancestral"},
    ],
    ids=str,
)
def test_a_picture_is_its_own(pipe, options):
    together = draw(pipe, [0, 1, 2], **options)
    for number in range(3):
        assert (draw(pipe, [number], **options)[0] == together[number]).all()
    assert (draw(pipe, [2, 0], **options)[1] == together[0]).all()
    assert abs(together[0] - together[1]).mean() > 0.01


def test_half_precision_computes_all_pictures_at_once(small_checkpoint):
    """The text encoder runs once in a call, and the UNet once in a step."""
    pipe, calls = KolorsPipeline.from_pretrained(small_checkpoint, dtype=torch.bfloat16), []
    for network in (pipe.text_encoder, pipe.unet):
        network.register_forward_hook(lambda network, *rest: calls.append(type(network).__name__))
    draw(pipe, [0, 1, 2])
    assert calls == ["GLMEncoder", *4 * ["UNet"]]
