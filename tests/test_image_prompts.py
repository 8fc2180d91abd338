"""Image prompts without an oracle: what is loaded and shared, what every layer looks at, its cost, and the errors."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from kolors_ref import KolorsPipeline, TextEmbeddings
from kolors_ref.config import CLIPVisionConfig, IPAdapterConfig, ScheduleConfig, UNetConfig, VAEConfig
from kolors_ref.image_prompts import attention_blocks, layer_scales, read_masks
from kolors_ref.images import clip_pixels
from kolors_ref.ip_adapter_file import count_cross_attentions, cross_attention_channels
from kolors_ref.models.clip import CLIPVision
from kolors_ref.models.ip_adapter import IPAdapter
from kolors_ref.models.unet import KeyValue, TransformerBlock, UNet
from kolors_ref.models.vae import VAE
from kolors_ref.sampling import NoiseSchedule, get_sampler
from weights_conversion.keymaps import clip as clip_names
from weights_conversion.keymaps import ip_adapter as adapter_names

UNET = UNetConfig(
    channels=(16, 32, 32), transformer_depth=(0, 1, 2), num_heads=(1, 2, 4), layers_per_block=1, norm_groups=8,
    cross_attention_dim=24, text_dim=20, pooled_dim=20, size_embed_dim=8,
)  # fmt: skip
ADAPTER = IPAdapterConfig(
    24, width=32, depth=1, heads=1, num_queries=3, ffn=48, output_dim=24, channels=cross_attention_channels(UNET)
)
ENCODER = CLIPVisionConfig(width=24, layers=2, heads=2, mlp=32, image_size=28, patch_size=14, projection_dim=8)
OFFICIAL = UNetConfig()


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.3 * noise + 1 if parameter.ndim < 2 else noise / parameter[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


def write_adapter(path, config=ADAPTER, seed=1):
    """An official file with random tensors."""
    order = adapter_names.file_order(*count_cross_attentions(UNET))
    state = {}
    for name, tensor in randomised(IPAdapter(config), seed).state_dict().items():
        if name.startswith("to_"):
            kind, place, rest = name.split(".")
            name = f"{kind}.{2 * order.index(int(place)) + 1}.{rest}"
        state[adapter_names.TABLE.to_official(name)] = tensor
    save_file(state, path)
    return path


def write_encoder(folder, config=ENCODER, seed=2):
    """An official image encoder's folder with random tensors."""
    folder.mkdir()
    state = randomised(CLIPVision(config), seed).state_dict()
    save_file({clip_names.TABLE.to_official(k): v for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(clip_names.CONFIG.to_official(asdict(config))))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "first.safetensors")
    write_adapter(folder / "second.safetensors", replace(ADAPTER, num_queries=5), seed=3)
    write_adapter(folder / "wide.safetensors", replace(ADAPTER, channels=(64,) * len(ADAPTER.channels)))
    write_adapter(folder / "blind.safetensors", replace(ADAPTER, image_dim=40))
    write_encoder(folder / "image_encoder")
    write_encoder(folder / "other_encoder", seed=4)
    return folder


@pytest.fixture
def pipe():
    """A pipeline without text parts: prompts are given as embeddings."""
    vae = VAE(VAEConfig(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4))
    unet = randomised(UNet(UNET), 5)
    return KolorsPipeline(None, None, unet, randomised(vae, 6), NoiseSchedule(ScheduleConfig()), get_sampler("euler"))


@pytest.fixture
def one(pipe, files):
    pipe.load_ip_adapter(files / "first.safetensors", image_encoder=files / "image_encoder")
    return pipe


@pytest.fixture
def two(one, files):
    one.load_ip_adapter(files / "second.safetensors")
    return one


def natural(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((40, 30), Image.Resampling.BICUBIC)


def arguments(prompts=1, height=64, width=64, **kwargs):
    text = {
        name: TextEmbeddings(
            natural(prompts, 4, UNET.text_dim, seed=seed), natural(prompts, UNET.pooled_dim, seed=seed)
        )
        for name, seed in (("prompt_embeds", 8), ("negative_prompt_embeds", 9))
    }
    generator = torch.Generator().manual_seed(10)
    fixed = {"negative_prompt": None, "num_inference_steps": 2, "height": height, "width": width}
    return text | fixed | {"generator": generator} | kwargs


def run(pipe, **kwargs):
    return pipe(**arguments(**kwargs), output_type="latent")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def test_the_text_only_path_is_as_it_was(pipe, files):
    """Bit for bit: with an adapter loaded, used and at scale 0, after unloading; the UNet's weights too."""
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    before = run(pipe)
    pipe.load_ip_adapter(files / "first.safetensors", image_encoder=files / "image_encoder")
    assert torch.equal(run(pipe), before)
    assert not torch.allclose(run(pipe, ip_adapter_image=picture()), before, atol=1e-2)
    assert torch.equal(run(pipe), before)
    assert torch.equal(run(pipe, ip_adapter_image=picture(), ip_adapter_scale=0), before)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


def test_names_and_unloading(pipe, files):
    path = files / "first.safetensors"
    for name in (None, "style", None):
        pipe.load_ip_adapter(path, image_encoder=files / "image_encoder", name=name)
    assert list(pipe.ip_adapters) == ["first", "style", "first-2"]
    with pytest.raises(ValueError, match="'style' is loaded already"):
        pipe.load_ip_adapter(path, name="style")
    with pytest.raises(ValueError, match="no IP-Adapter named 'odd'; loaded: 'first', 'style', 'first-2'"):
        pipe.unload_ip_adapter("odd")
    pipe.unload_ip_adapter("style")
    assert list(pipe.ip_adapters) == ["first", "first-2"]
    pipe.unload_ip_adapter()
    assert pipe.ip_adapters == {}
    pipe.unload_ip_adapter()


def test_image_encoders_are_shared(pipe, files, tmp_path):
    """Beside the file by default; then the last one's, or the one of a folder read before; else another."""
    pipe.load_ip_adapter(files / "first.safetensors")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((files / "second.safetensors").read_bytes())
    pipe.load_ip_adapter(moved)
    pipe.load_ip_adapter(moved, image_encoder=str(files / "image_encoder"))
    pipe.load_ip_adapter(moved, image_encoder=files / "other_encoder")
    first, *others = (adapter.encoder for adapter in pipe.ip_adapters.values())
    assert [encoder is first for encoder in others] == [True, True, False]


def test_the_image_encoder_beside_a_linked_file(pipe, files, tmp_path):
    """The cache of the Hugging Face hub holds links to files that lie elsewhere, under other names."""
    link = tmp_path / "adapter.safetensors"
    link.symlink_to(files / "first.safetensors")
    (tmp_path / "image_encoder").mkdir()
    for file in (files / "other_encoder").iterdir():
        (tmp_path / "image_encoder" / file.name).symlink_to(file)
    pipe.load_ip_adapter(link)
    pipe.load_ip_adapter(link, image_encoder=files / "other_encoder", name="expected")
    linked, expected = (adapter.encoder.state_dict() for adapter in pipe.ip_adapters.values())
    assert all(torch.equal(linked[name], tensor) for name, tensor in expected.items())


def test_a_failed_load_leaves_nothing(one, files):
    with pytest.raises(FileNotFoundError):
        one.load_ip_adapter(files / "missing.safetensors")
    with pytest.raises(FileNotFoundError):
        one.load_ip_adapter(files / "second.safetensors", image_encoder=files / "missing")
    assert list(one.ip_adapters) == ["first"]


def test_another_number_format_than_the_unets(one):
    """An adapter that was loaded before the UNet was cast serves it as well."""
    given = {"ip_adapter_image": picture(), "latents": natural(1, 4, 8, 8)}
    single = run(one, **given)
    one.unet.double()
    double = run(one, **given | {"latents": given["latents"].double()})
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What the layers look at
# ---------------------------------------------------------------------------------------------------------------------


def test_scales_of_the_official_unet():
    """In order of execution: 4 + 20 layers down, 10 in the middle, 30 + 6 up."""
    assert sum(block.transformers * block.depth for block in attention_blocks(OFFICIAL)) == 70
    assert layer_scales(0.5, OFFICIAL) == [0.5] * 70
    style = layer_scales({"up": {"block_0": [0.0, 1.0, 0.0]}}, OFFICIAL)
    assert style == [0.0] * 44 + [1.0] * 10 + [0.0] * 16
    layout = layer_scales({"down": {"block_2": [0.0, 1.0]}}, OFFICIAL)
    assert layout == [0.0] * 14 + [1.0] * 10 + [0.0] * 46
    mixed = layer_scales({"down": [1, 2], "mid": [3], "up": {"block_1": 4}}, OFFICIAL)
    assert mixed == [1] * 2 + [2] * 2 + [1] * 10 + [2] * 10 + [3] * 10 + [0] * 30 + [4] * 6
    assert layer_scales({}, OFFICIAL) == [0.0] * 70


def test_layers_of_scale_zero_hold_no_keys(two):
    """Nothing is looked at there; elsewhere the text, then the adapters' pictures."""
    scale = [{"mid": 0.5}, {"down": 2.0}]
    (context,) = two.denoise(**arguments(ip_adapter_image=[picture()] * 2, ip_adapter_scale=scale)).contexts
    assert count_cross_attentions(UNET) == (3, 2, 6)
    assert [len(layer) for layer in context.layers] == [2] * 3 + [2] * 2 + [1] * 6
    assert [layer[-1].weight for layer in context.layers] == [2.0] * 3 + [0.5] * 2 + [None] * 6
    assert [layer[-1].key.shape[2] for layer in context.layers[:5]] == [5] * 3 + [3] * 2


def test_an_adapter_may_rest(two):
    only = run(two, ip_adapter_image=[None, picture()])
    two.unload_ip_adapter("first")
    assert torch.equal(run(two, ip_adapter_image=picture()), only)


def test_the_branch_of_nothing_is_pixels_of_zero(one):
    """CLIP sees a tensor of zeros, which is neither a black picture nor features of zero."""
    (embeds,) = one.encode_image([picture(0), picture(1)])
    encoder = one.ip_adapters["first"].encoder
    assert embeds.shape == (2, 2, 5, 24)
    assert torch.allclose(embeds[0], encoder(torch.zeros(2, 3, 28, 28)), atol=1e-5)
    assert torch.allclose(embeds[1], encoder(clip_pixels([picture(0), picture(1)], 28)), atol=1e-5)
    assert embeds[0].abs().mean() > 0.1
    assert not torch.allclose(embeds[0, 0], encoder(clip_pixels(Image.new("RGB", (9, 9)), 28))[0], atol=1e-2)


def test_rows_of_the_context(one):
    """Negative rows first; every prompt and picture of a branch looks at the same keys."""
    given = {"ip_adapter_image": picture(), "num_images_per_prompt": 2, "prompts": 2}
    keys = lambda **more: [c.layers[0][1].key for c in one.denoise(**arguments(**given, **more)).contexts]
    pictures, alone = keys(), torch.cat(keys(guidance_scale=1.0))
    assert [len(key) for key in pictures] == [2] * 4
    assert alone.shape[0] == 4
    key = torch.cat([key[i : i + 1] for i in range(2) for key in pictures])
    assert torch.equal(key[:4], key[:1].expand(4, -1, -1, -1))
    assert torch.equal(key[4:], key[4:5].expand(4, -1, -1, -1))
    assert torch.allclose(key[4:], alone, atol=1e-6)
    assert not torch.allclose(key[:4], alone, atol=1e-2)


def test_all_pictures_at_once_see_them_too(pipe, files):
    """In half precision the pictures of a call share one context."""
    pipe.unet.bfloat16()
    pipe.load_ip_adapter(files / "first.safetensors", image_encoder=files / "image_encoder")
    several = {"num_images_per_prompt": 2, "prompts": 2}
    [context] = pipe.denoise(**arguments(ip_adapter_image=picture(), **several)).contexts
    assert all(len(layer) == 2 for layer in context.layers)
    assert [len(part.key) for part in context.layers[0]] == [8, 8]
    before, after = run(pipe, **several), run(pipe, ip_adapter_image=picture(), **several)
    assert (before - after).abs().flatten(1).max(1).values.min() > 0.1


def test_nothing_is_recomputed(one):
    """CLIP, resampler and projections run once, whatever the number of steps."""
    adapter, runs = one.ip_adapters["first"], []
    for module in (adapter.encoder, adapter.model.resampler, *adapter.model.to_k, *adapter.model.to_v):
        module.register_forward_hook(lambda module, *_: runs.append(module))
    run(one, ip_adapter_image=picture(), num_inference_steps=5)
    assert len(runs) == len(set(runs)) == 2 + 2 * 11
    embeds = one.encode_image(picture())
    runs.clear()
    run(one, ip_adapter_embeds=embeds)
    assert adapter.encoder not in runs


def test_without_guidance_clip_sees_the_pictures_alone(one):
    seen = []
    one.ip_adapters["first"].encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run(one, ip_adapter_image=[picture(0), picture(1)])
    run(one, ip_adapter_image=[picture(0), picture(1)], guidance_scale=1.0)
    assert seen == [3, 2]


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("level", [1, 2])
def test_the_cost_at_full_size(level, side):
    """For pictures of 512 and of 1024 pixels: under 1 % of the arithmetic of what looks at the image tokens."""
    channels, heads, pixels = OFFICIAL.channels[level], OFFICIAL.num_heads[level], (side >> level) ** 2
    flops = []
    with torch.device("meta"), torch.no_grad():
        block = TransformerBlock(channels, OFFICIAL.cross_attention_dim, heads)
        text, image = (KeyValue(*(torch.empty(2, heads, n, 64) for _ in "kv")) for n in (256, 16))
        for context in ([text], [text, image]):
            with FlopCounterMode(display=False) as counter:
                block(torch.empty(2, pixels, channels), context)
            flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 2 * 2 * pixels * 16 * channels
    assert flops[1] < 1.01 * flops[0]


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 56), (40, 104)])
def test_masks_of_ones_and_zeros(one, height, width):
    """All of the picture, or nothing; also where the UNet's halves are rounded up (72 x 56: 9 x 7, 5 x 4, 3 x 2)."""
    size = {"height": height, "width": width}
    ones = run(one, ip_adapter_image=picture(), ip_adapter_mask=torch.ones(height, width), **size)
    assert torch.allclose(ones, run(one, ip_adapter_image=picture(), **size), rtol=1e-4, atol=1e-4)
    zeros = run(one, ip_adapter_image=picture(), ip_adapter_mask=torch.zeros(1, height, width), **size)
    assert torch.allclose(zeros, run(one, **size), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ones, zeros, rtol=1e-2, atol=1e-2)


def test_forms_of_a_mask():
    """Tensors, arrays and booleans as they are; Pillow images resized and made black or white."""
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    for mask in (ramp, ramp[None], ramp[None, None], [ramp], ramp.numpy(), [[ramp.numpy()]]):
        (given,) = read_masks(mask, 64, 64)
        assert torch.equal(given, ramp)
    flipped = np.fliplr(np.fliplr(ramp.numpy()).copy())
    for mask in (flipped, ramp.numpy().astype(">f4"), np.broadcast_to(ramp.numpy(), (8, 8))):
        assert torch.equal(read_masks(mask, 64, 64)[0], ramp)
    (half,) = read_masks(ramp > 0.5, 64, 64)
    assert torch.equal(half, (ramp > 0.5).float())
    assert len(read_masks([ramp.expand(2, 8, 8), ramp], 64, 64)) == 3
    (image,) = read_masks(Image.fromarray((ramp * 255).byte().numpy()), 64, 32)
    assert image.shape == (64, 32)
    assert set(image.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(image[:, 20:], torch.ones(64, 12))
    (deep,) = read_masks(Image.fromarray((ramp * 65535).numpy().astype(np.uint16)), 64, 32)
    assert torch.equal(deep, image)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

FULL = torch.ones(64, 64)
BAD = {
    "both": ({"ip_adapter_embeds": [FULL]}, ValueError, "both ip_adapter_image and ip_adapter_embeds"),
    "no picture": ({"ip_adapter_image": 3}, TypeError, "must be a Pillow image"),
    "empty": ({"ip_adapter_image": []}, ValueError, "no picture"),
    "word": ({"ip_adapter_scale": "much"}, TypeError, "ip_adapter_scale must be a number, not 'much'"),
    "none": ({"ip_adapter_scale": None}, TypeError, "ip_adapter_scale must be a number"),
    "truth": ({"ip_adapter_scale": True}, TypeError, "ip_adapter_scale must be a number"),
    "nan": ({"ip_adapter_scale": float("nan")}, ValueError, "must be a finite number"),
    "word in a list": ({"ip_adapter_scale": ["much"]}, TypeError, "must be a number, not 'much'"),
    "word in a part": ({"ip_adapter_scale": {"mid": "much"}}, TypeError, "must be a number, not 'much'"),
    "part": ({"ip_adapter_scale": {"middle": 1}}, ValueError, "'middle'; the UNet has attention in down, mid, up"),
    "block": ({"ip_adapter_scale": {"up": {"block_2": 1}}}, ValueError, "'block_2'.*block_0, block_1"),
    "transformers": (
        {"ip_adapter_scale": {"up": [1, 2, 3]}},
        ValueError,
        "has 3 numbers for up block_0.* each of its 2",
    ),
    "scales": ({"ip_adapter_scale": [1, 2]}, ValueError, "2 entries for an adapter with 1 reference"),
    "no scales": ({"ip_adapter_scale": []}, ValueError, "0 entries"),
    "mask's kind": ({"ip_adapter_mask": "left"}, TypeError, "holds a str"),
    "mask's format": ({"ip_adapter_mask": FULL.byte()}, TypeError, "booleans or floats"),
    "mask's axes": ({"ip_adapter_mask": FULL[0]}, ValueError, r"has the shape \(64,\); it must be \(h, w\)"),
    "mask's shape": ({"ip_adapter_mask": FULL[:32]}, ValueError, r"shape \(32, 64\).* 64 x 64 pixels"),
    "empty mask": ({"ip_adapter_mask": FULL[:0, :0]}, ValueError, "has the shape"),
    "mask's values": ({"ip_adapter_mask": 2 * FULL}, ValueError, "outside"),
    "mask of nan": ({"ip_adapter_mask": FULL * float("nan")}, ValueError, "outside"),
    "masks": ({"ip_adapter_mask": [FULL, FULL]}, ValueError, "2 masks, but there are 1 reference"),
    "mask alone": ({"ip_adapter_image": None, "ip_adapter_mask": FULL}, ValueError, "without a reference picture"),
}


def check_sentence(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(one, case):
    given, kind, words = BAD[case]
    with pytest.raises(kind, match=words) as caught:
        run(one, **{"ip_adapter_image": picture()} | given)
    assert type(caught.value) is kind
    check_sentence(caught.value)


EMBEDS = torch.ones(2, 1, 5, 24)
BAD_EMBEDS = {
    "one branch": (EMBEDS[:1], ValueError, r"has the shape \(1, 1, 5, 24\); it must be \(2, N, L, 24\)"),
    "width": (EMBEDS[..., :20], ValueError, "it must be"),
    "axes": (EMBEDS[0], ValueError, "it must be"),
    "two": ([EMBEDS, EMBEDS], TypeError, "one tensor for each"),
    "kind": ("embeds", TypeError, "not str"),
    "nan": (EMBEDS * float("nan"), FloatingPointError, "NaN"),
}


@pytest.mark.parametrize("case", BAD_EMBEDS)
def test_bad_embeddings(one, case):
    embeds, kind, words = BAD_EMBEDS[case]
    with pytest.raises(kind, match=words) as caught:
        run(one, ip_adapter_embeds=embeds)
    check_sentence(caught.value)


@pytest.mark.parametrize("given", [picture(), [picture()], [picture()] * 3])
def test_a_list_with_an_entry_for_each_adapter(two, given):
    with pytest.raises(ValueError, match="ip_adapter_image must be a list of 2, an entry for each") as caught:
        run(two, ip_adapter_image=given)
    check_sentence(caught.value)


@pytest.mark.parametrize("given", [{"ip_adapter_image": picture()}, {"ip_adapter_embeds": EMBEDS}])
def test_a_reference_picture_without_an_adapter(pipe, given):
    with pytest.raises(ValueError, match="given, but no IP-Adapter is loaded; load one with load_ip_adapter") as caught:
        run(pipe, **given)
    check_sentence(caught.value)
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        pipe.encode_image(picture())


def test_adapters_of_another_model(pipe, files):
    with pytest.raises(ValueError, match="made for another UNet: layer 0 has 64 channels instead of 32") as caught:
        pipe.load_ip_adapter(files / "wide.safetensors")
    check_sentence(str(caught.value).replace(str(files), ""))
    with pytest.raises(ValueError, match=r"made for an image encoder of width 40, but .* has 24") as caught:
        pipe.load_ip_adapter(files / "blind.safetensors")
    check_sentence(str(caught.value).replace(str(files), ""))
