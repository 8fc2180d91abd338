"""The picture of a prompt does not depend on what else is in the call: the same bits in fp32 and fp64."""

import pytest
import torch
from PIL import Image

from kolors_ref import KolorsPipeline

PROMPTS = ["a red cat on the roof of a very old house in the rain " * 9, "一座灯塔", ""]
NEGATIVES = ["ugly", "", "a long list of everything that ought not to be seen in this picture, 模糊"]


@pytest.fixture(scope="module", params=[("small", torch.float32), ("small", torch.float64), ("mini", torch.float64)])
def pipe(request, small_checkpoint):
    """Matrix products of embeddings as wide as the miniature's hang on how these lie in memory."""
    model, dtype = request.param
    return KolorsPipeline.from_pretrained(small_checkpoint if model == "small" else model, dtype=dtype)


def draw(pipe, numbers, **options):
    """Pictures of some of the prompts, each from noise of its own."""
    noises = [torch.Generator().manual_seed(number) for number in numbers]
    sizes = {"height": 64, "width": 80, "num_inference_steps": 4, "output_type": "pt"}
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
        {"image": [Image.effect_noise((80, 64), sigma) for sigma in (20, 90, 60)], "strength": 0.5},
    ],
    ids=lambda options: "-".join(options) or "plain",
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


def test_one_prompt_may_come_without_a_list(pipe):
    alone, listed = pipe.encode_packed("a dog"), pipe.encode_packed(["a dog"])
    assert torch.equal(alone.sequence, listed.sequence)
    assert torch.equal(alone.pooled, listed.pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_pictures_share_what_is_computed_of_their_prompt(small_checkpoint, dtype):
    """Keys and values of two prompts and their negatives: 4 rows for 6 pictures, and these are as of old."""
    pipe, rows = KolorsPipeline.from_pretrained(small_checkpoint, dtype=dtype), []
    pipe.unet.text_proj.register_forward_hook(lambda network, inputs, output: rows.append(len(output)))
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np", "latents": noise}
    negatives = ["ugly", "模糊"]
    several = pipe(PROMPTS[:2], negatives, num_images_per_prompt=3, **options)
    assert sum(rows) == 4
    told_thrice = [[text for text in texts for _ in range(3)] for texts in (PROMPTS[:2], negatives)]
    assert abs(several - pipe(*told_thrice, **options)).max() <= (0 if dtype == torch.float32 else 0.1)
