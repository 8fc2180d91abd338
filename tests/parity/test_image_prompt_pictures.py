"""Image prompts: whole pictures with one and two IP-Adapters against diffusers, on files that it wrote or reads."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import KolorsImg2ImgPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from parity.oracle import assert_parity, randomise, small_pipeline, unet_config
from parity.test_ip_adapter import official_parts, write
from parity.test_pipeline import assert_same_pictures as assert_same_in_255
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from kolors_ref import KolorsPipeline
from kolors_ref.cli import main
from kolors_ref.config import IPAdapterConfig, UNetConfig
from kolors_ref.ip_adapter_file import cross_attention_channels
from weights_conversion.keymaps import KEYMAPS

UNET = UNetConfig(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in KEYMAPS["unet"].CONFIG.to_ours(unet_config(), "").items()}
)
ADAPTER = IPAdapterConfig(
    40, width=32, depth=4, heads=2, num_queries=4, ffn=128, output_dim=48, channels=cross_attention_channels(UNET)
)
CLIP_SIZE = 32
SHARED = {"negative_prompt": "blurry", "num_inference_steps": 2, "guidance_scale": 4.0}
BLOCKWISE = [
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
    {"down": 0.5},
    {"down": [0.3, 1.2], "mid": 0.7, "up": {"block_1": 0.4}},
    {"mid": [2.0]},
]


def picture(seed, height=40, width=56):
    """A reference picture with areas of its own, which CLIP's input keeps."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(side, height=48, width=48):
    """Grey levels that fall from one side to the other."""
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
    return Image.fromarray(ramp if side == "right" else np.ascontiguousarray(ramp[:, ::-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, an image encoder and two adapters of different sizes, the second in both kinds of file."""
    folder = tmp_path_factory.mktemp("image_prompts")
    small_pipeline().save_pretrained(folder / "base")
    config = CLIPVisionConfig(
        hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=CLIP_SIZE,
        patch_size=8, projection_dim=8,
    )  # fmt: skip
    randomise(CLIPVisionModelWithProjection(config), seed=3).save_pretrained(folder / "image_encoder")
    write(folder / "first.bin", official_parts(ADAPTER, UNET, seed=4))
    second = official_parts(replace(ADAPTER, width=48, num_queries=7, ffn=192), UNET, seed=5)
    write(folder / "second.safetensors", second)
    write(folder / "second.bin", second)
    return folder


FILES = ("first.bin", "second.safetensors")


@pytest.fixture(scope="module")
def make_oracle(folder):
    """diffusers' pipeline with the first adapters of FILES in it; the parts that adapters leave alone are shared."""
    base = small_pipeline()
    made = {}

    def make(count, dtype=torch.float32):
        if (count, dtype) not in made:
            parts = {name: part for name, part in base.components.items() if name not in ("unet", "image_encoder")}
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").to(dtype)
            parts["feature_extractor"] = CLIPImageProcessor(size=CLIP_SIZE, crop_size=CLIP_SIZE)
            pipe = type(base)(**parts, unet=deepcopy(base.unet).to(dtype), image_encoder=encoder)
            pipe.load_ip_adapter(str(folder), subfolder="", weight_name=list(FILES[:count]), low_cpu_mem_usage=False)
            pipe.unet.to(dtype)
            pipe.set_progress_bar_config(disable=True)
            made[count, dtype] = pipe
        return made[count, dtype]

    return make


def load_ours(folder, count, dtype=torch.float32, files=FILES):
    pipe = KolorsPipeline.from_pretrained(folder / "base", dtype=dtype)
    for name in files[:count]:
        pipe.load_ip_adapter(folder / name, image_encoder=folder / "image_encoder")
    return pipe


@pytest.fixture(scope="module")
def ours(folder):
    """Our pipelines with one and with two adapters."""
    return {count: load_ours(folder, count) for count in (1, 2)}


def generator():
    return torch.Generator().manual_seed(6)


def run_oracle(oracle, references, scale=1.0, prompt="一只猫", size=64, masks=None, **kwargs):
    oracle.set_ip_adapter_scale(scale)
    extra = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
    arguments = SHARED | {"height": size, "width": size} | extra | kwargs
    return oracle(prompt, ip_adapter_image=references, generator=generator(), output_type="np", **arguments).images


def run_ours(pipe, references, scale=1.0, prompt="一只猫", size=64, **kwargs):
    arguments = SHARED | {"height": size, "width": size, "ip_adapter_scale": scale} | kwargs
    return pipe(prompt, ip_adapter_image=references, generator=generator(), output_type="np", **arguments)


def assert_same_pictures(ours, theirs):
    assert_same_in_255(ours * 255, theirs * 255)


# ---------------------------------------------------------------------------------------------------------------------
# Text-to-image and image-to-image
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, *BLOCKWISE])
def test_text_to_image(make_oracle, ours, scale):
    """At a scale that is not 0 the reference picture changes far more than the two implementations differ."""
    theirs = run_oracle(make_oracle(1), picture(0), scale)
    result = run_ours(ours[1], picture(0), scale)
    assert_same_pictures(result, theirs)
    without = run_ours(ours[1], None)
    assert np.array_equal(result, without) if scale == 0 else np.abs(result - without).max() > 10 / 255


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, BLOCKWISE[0]])
def test_image_to_image(make_oracle, ours, scale):
    start = picture(7, 64, 64)
    oracle = make_oracle(1)
    oracle.set_ip_adapter_scale(scale)
    pipe = KolorsImg2ImgPipeline(**oracle.components)
    pipe.set_progress_bar_config(disable=True)
    arguments = SHARED | {"num_inference_steps": 4, "strength": 0.6, "image": start}
    theirs = pipe(
        "一只猫", ip_adapter_image=picture(0), generator=generator(), output_type="np", height=64, width=64, **arguments
    )
    assert_same_pictures(run_ours(ours[1], picture(0), scale, **arguments), theirs.images)


def test_without_guidance(make_oracle, ours):
    theirs = run_oracle(make_oracle(1), picture(0), guidance_scale=1.0)
    assert_same_pictures(run_ours(ours[1], picture(0), guidance_scale=1.0), theirs)


def test_several_pictures_of_a_prompt(make_oracle, ours):
    theirs = run_oracle(make_oracle(1), picture(0), num_images_per_prompt=2)
    assert_same_pictures(run_ours(ours[1], picture(0), num_images_per_prompt=2), theirs)


def test_several_prompts(make_oracle, ours):
    """Against one oracle's run a prompt: with two at once diffusers' keys take each other's rows."""
    oracle, prompts = make_oracle(1), ["一只猫", "a red house by the sea"]
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    theirs = [run_oracle(oracle, picture(0), prompt=prompts[i], latents=noise[i : i + 1]) for i in range(2)]
    result = run_ours(ours[1], picture(0), prompt=prompts, latents=noise)
    assert_same_pictures(result, np.concatenate(theirs))


@pytest.mark.parametrize("nested", [False, True])
def test_several_reference_pictures(make_oracle, ours, nested):
    """A list for a single adapter is all its own; diffusers wants it in another list."""
    pictures = [picture(0), picture(1, 56, 40)]
    theirs = run_oracle(make_oracle(1), [pictures])
    assert_same_pictures(run_ours(ours[1], [pictures] if nested else pictures), theirs)


@pytest.mark.parametrize("scale", [1.0, [0.3, 0.9], [BLOCKWISE[0], 0.5], [0.0, 0.8]])
def test_two_adapters(make_oracle, ours, scale):
    """With a scale for both or for each, and two pictures for the second."""
    pictures = [picture(0), [picture(1), picture(2)]]
    theirs = run_oracle(make_oracle(2), pictures, scale if isinstance(scale, list) else [scale, scale])
    assert_same_pictures(run_ours(ours[2], pictures, scale), theirs)


def test_both_kinds_of_file(folder, make_oracle):
    """The same adapter as .bin and as .safetensors gives the same picture, which is diffusers'."""
    kinds = [load_ours(folder, 1, files=[f"second.{kind}"]) for kind in ("bin", "safetensors")]
    first, second = (run_ours(pipe, picture(1)) for pipe in kinds)
    assert np.array_equal(first, second)
    assert_same_pictures(first, run_oracle(make_oracle(2), [picture(0), picture(1)], [0.0, 1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def oracle_masks(masks, height, width):
    """Masks of one adapter as diffusers' attention takes them, (1, M, H, W)."""
    return IPAdapterMaskProcessor().preprocess(masks, height=height, width=width).movedim(1, 0)


@pytest.mark.parametrize("scale", [0.7, [0.4, 1.0]])
@pytest.mark.parametrize("width", [64, 96])
def test_masks(make_oracle, ours, scale, width):
    """Two pictures of one adapter, each with its region, one scale or two."""
    pictures, masks = [picture(0), picture(1)], [half_mask("left"), half_mask("right")]
    tensors = oracle_masks(masks, 64, width)
    theirs = run_oracle(
        make_oracle(1), [pictures], [scale] if isinstance(scale, list) else scale, width=width, masks=[tensors]
    )
    assert_same_pictures(run_ours(ours[1], pictures, scale, width=width, ip_adapter_mask=masks), theirs)
    assert_same_pictures(run_ours(ours[1], pictures, scale, width=width, ip_adapter_mask=tensors), theirs)
    unmasked = run_ours(ours[1], pictures, 0.7, width=width)
    assert np.abs(unmasked - theirs).max() > 10 / 255


def test_soft_masks_of_two_adapters(make_oracle, ours):
    """Tensors keep their grey levels; the second adapter has no mask."""
    soft = torch.rand(1, 1, 64, 64, generator=generator())
    pictures = [picture(0), picture(1)]
    theirs = run_oracle(make_oracle(2), pictures, [1.0, 0.5], masks=[soft, None])
    assert_same_pictures(run_ours(ours[2], pictures, [1.0, 0.5], ip_adapter_mask=[soft[0, 0], None]), theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings, and the networks in float64
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_embeddings_in_and_out(make_oracle, ours, guidance_scale):
    """They are CLIP's hidden states, the branch of nothing first, as diffusers gives and takes them."""
    oracle, pictures = make_oracle(2), [picture(0), [picture(1), picture(2)]]
    embeds = ours[2].encode_image(pictures)
    guided = guidance_scale > 1
    theirs = oracle.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 1, guided)
    for own, other in zip(embeds, theirs, strict=True):
        assert_parity(own if guided else own[1:], other)
    result = run_ours(ours[2], pictures, guidance_scale=guidance_scale)
    for given in (embeds, theirs):
        again = run_ours(ours[2], None, ip_adapter_embeds=given, guidance_scale=guidance_scale)
        assert_same_pictures(again, result)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [[1.0, 0.5], [BLOCKWISE[2], -0.8]])
def test_the_guided_unet_in_float64(folder, make_oracle, scale, masked):
    """From the pictures to the noise of both branches, two adapters: relative error 1e-10."""
    oracle, pipe = make_oracle(2, torch.float64), load_ours(folder, 2, torch.float64)
    pictures = [picture(0), [picture(1), picture(2)]]
    masks = [torch.rand(1, n, 64, 64, generator=generator(), dtype=torch.float64) for n in (1, 2)] if masked else None
    prompt, negative = pipe.encode_prompt(["一只猫"]), pipe.encode_prompt(["blurry"])
    denoising = pipe.denoise(
        prompt_embeds=prompt, negative_prompt=None, negative_prompt_embeds=negative, height=64, width=64,
        ip_adapter_image=pictures, ip_adapter_scale=scale, ip_adapter_mask=masks,
    )  # fmt: skip
    latents = torch.randn(1, 4, 8, 8, generator=generator(), dtype=torch.float64).repeat(2, 1, 1, 1)
    oracle.set_ip_adapter_scale(scale)
    with torch.no_grad():
        embeds = oracle.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 1, True)
        theirs = oracle.unet(
            latents,
            500,
            torch.cat([negative.sequence, prompt.sequence]),
            added_cond_kwargs={
                "text_embeds": torch.cat([negative.pooled, prompt.pooled]),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
                "image_embeds": embeds,
            },
            cross_attention_kwargs={"ip_adapter_masks": masks} if masked else None,
        ).sample
        assert_parity(pipe.unet(latents, 500, denoising.contexts[0]), theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_command_line_and_repeat(folder, make_oracle, tmp_path, capsys):
    """--ip-adapter, --ip-image, --ip-scale with --image and --strength draw diffusers' picture, and again."""
    picture(1).save(tmp_path / "reference.png")
    picture(2, 64, 80).save(tmp_path / "start.png")
    arguments = [
        "一只猫", "--model", str(folder / "base"), "--negative-prompt", "blurry", "--steps", "8", "--seed", "6",
        "--guidance-scale", "4", "--ip-adapter", str(folder / "first.bin"), "--ip-image",
        str(tmp_path / "reference.png"), "--ip-scale", "0.5", "--image", str(tmp_path / "start.png"), "--strength",
        "0.5", "-o", str(tmp_path / "out.png"),
    ]  # fmt: skip
    assert main(arguments) == 0
    made = np.array(Image.open(tmp_path / "out.png")).astype(int)
    oracle = KolorsImg2ImgPipeline(**make_oracle(1).components)
    oracle.set_progress_bar_config(disable=True)
    oracle.set_ip_adapter_scale(0.5)
    theirs = oracle(
        "一只猫", negative_prompt="blurry", image=picture(2, 64, 80), strength=0.5, num_inference_steps=8,
        guidance_scale=4.0, ip_adapter_image=picture(1), generator=generator(), output_type="np",
    ).images[0]  # fmt: skip
    levels = np.round(theirs * 255).astype(int)  # whole ones, as in a PNG
    assert levels.std() > 5
    assert np.abs(made - levels).max() <= 1

    assert main(["--repeat", str(tmp_path / "out.png"), "-o", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "again.png")), np.array(Image.open(tmp_path / "out.png")))
    picture(3).save(tmp_path / "reference.png")
    assert main(["--repeat", str(tmp_path / "out.png"), "-o", str(tmp_path / "other.png")]) == 2
    assert "is no longer the file" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()
