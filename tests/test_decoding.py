"""The autoencoder at work: what overflows in fp16 is computed again in fp32, and large pictures come tile by tile."""

import re
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_prompts import randomised
from test_loading import draw

from kolors_ref import KolorsPipeline
from kolors_ref.config import VAEConfig
from kolors_ref.decoding import blend_weights, decode_tiled, tile_starts, without_overflow
from kolors_ref.models.vae import VAE


def small_vae(seed=0):
    """A random autoencoder of factor 8."""
    return randomised(VAE(VAEConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4)), seed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_middle_keeps_the_layout(part, layout):
    """In fp32 on a CPU that is the ordinary one, where group norm loses no digits."""
    middle = getattr(small_vae(), part).mid
    x = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    assert middle(x).is_contiguous(memory_format=layout)


def overflowing(vae, part):
    """The autoencoder with residuals beyond fp16's largest number, which the next norm brings back."""
    vae = deepcopy(vae)
    getattr(vae, part).conv_in.weight.mul_(1e5).clamp_(-6e4, 6e4)
    vae.post_quant_conv.bias.zero_()  # so that latents near zero do not overflow
    return vae


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls:
    """Counts how often a method of an autoencoder is called, and in which dtype."""

    def __init__(self, monkeypatch, name):
        self.dtypes, method = [], getattr(VAE, name)
        monkeypatch.setattr(VAE, name, lambda vae, x: self.dtypes.append(x.dtype) or method(vae, x))


# ---------------------------------------------------------------------------------------------------------------------
# Overflow
# ---------------------------------------------------------------------------------------------------------------------


def test_fp16_where_it_suffices(monkeypatch):
    """One decoding, in fp16, of a picture that does not overflow; other formats are never computed twice."""
    decode, calls, vae = VAE.decode, Calls(monkeypatch, "decode"), small_vae()
    x = latents(1, 4, 4, 4)
    [y] = without_overflow(deepcopy(vae).half(), [x], lambda vae, x: vae.decode(x))
    assert calls.dtypes == [torch.float16]
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), decode(vae, x), atol=0.05, rtol=0.05)
    broken = overflowing(vae, "decoder")
    broken.decoder.conv_in.weight.mul_(1e35)
    assert not without_overflow(broken, [x], lambda vae, x: vae.decode(x))[0].isfinite().all()
    assert calls.dtypes == [torch.float16, torch.float32]


@pytest.mark.parametrize("tiled", [False, True])
def test_a_decoding_that_overflows(small_checkpoint, monkeypatch, tiled):
    """It is done again in fp32, and so are those after it: the numbers are those of the same weights in fp32."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint)
    pipe.vae = overflowing(small_vae(), "decoder").half()
    x = torch.cat([latents(1, 4, 4, 4) * scale for scale in (1e-6, 1, 1, 1e-6)])
    assert pipe.vae.decode(x[:1].half()).isfinite().all()
    assert not pipe.vae.decode(x[1:2].half()).isfinite().all()
    calls = Calls(monkeypatch, "decode")
    pictures = pipe.decode(x, "pt", tiled)
    assert calls.dtypes == [torch.float16] * 2 + [torch.float32] * 3
    exact = deepcopy(pipe.vae).float()
    expected = torch.cat([exact.decode(one) for one in x[1:].split(1)]) * 0.5 + 0.5
    assert torch.equal(pictures[1:].float(), expected.clamp(0, 1))
    assert pictures.isfinite().all()
    assert all(parameter.dtype == torch.float16 for parameter in pipe.vae.parameters())


def test_an_encoding_that_overflows(small_checkpoint, monkeypatch):
    """A picture to start from is encoded again in fp32, with the same noise."""
    picture = Image.effect_noise((32, 32), 60)
    pipe = KolorsPipeline.from_pretrained(small_checkpoint)
    results = []
    for vae in (overflowing(small_vae(), "encoder").half(), overflowing(small_vae(), "encoder").half().float()):
        pipe.vae = vae
        calls = Calls(monkeypatch, "encode")
        results.append(draw(pipe, image=picture, strength=0, output_type="latent"))
        assert calls.dtypes == {2: [torch.float16, torch.float32], 4: [torch.float32]}[vae.quant_conv.weight.itemsize]
    assert torch.equal(results[0], results[1])


def test_what_no_format_helps(small_checkpoint):
    """NaN in fp32 too is an error that names the stage, never a picture."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint)
    pipe.vae = small_vae().half()
    pipe.vae.decoder.norm_out.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"decoding \(the VAE\) gave NaN or infinity"):
        pipe.decode(latents(1, 4, 4, 4))


def test_latents_that_are_no_tensor(small_pipe):
    with pytest.raises(TypeError, match="latents must be a tensor, not ndarray"):
        small_pipe.decode(np.zeros((1, 4, 4, 4)))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 8, 8), (1, 4, 8, 8, 1)])
def test_latents_of_another_shape(small_pipe, shape):
    with pytest.raises(
        ValueError, match=rf"latents has shape {re.escape(str(shape))}; the VAE decodes \(N, 4, H/8, W/8"
    ):
        small_pipe.decode(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 7), (8, 1), (8, 0), (16, 4)])
def test_tiles_cover_and_overlap(tile, overlap):
    for size in range(1, 70):
        starts = tile_starts(size, tile, overlap)
        assert starts[0] == 0
        assert starts[-1] == max(size - tile, 0)
        assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))
        assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) + tile < size, "one tile too many"


def test_the_blend_is_linear():
    """Over an overlap one tile's weight falls as the other's rises, to the same sum."""
    weights = blend_weights(32, 8)
    assert torch.equal(weights, weights.flip(0))
    torch.testing.assert_close(weights[:8].diff(), torch.full((7,), 1 / 8))
    torch.testing.assert_close(weights[:8] + weights[-8:], torch.ones(8))
    assert (weights[8:-8] == 1).all()


class Enlarger(VAE):
    """Decodes every latent to 8 x 8 equal pixels: a decoder that tiles cannot change."""

    def decode(self, latents):
        self.windows.append(tuple(latents.shape[-2:]))
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8)


@pytest.mark.parametrize("size", [(9, 9), (5, 30), (21, 17), (8, 8), (3, 4)])
def test_every_pixel_is_where_it_belongs(size):
    vae = Enlarger(VAEConfig(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4))
    vae.windows, x = [], latents(2, 4, *size)
    pixels = decode_tiled(vae, x, tile=8, overlap=3)
    torch.testing.assert_close(pixels, vae.decode(x), atol=1e-6, rtol=1e-6)
    assert all(window == (min(size[0], 8), min(size[1], 8)) for window in vae.windows[:-1])
    assert len(vae.windows) - 1 == len(tile_starts(size[0], 8, 3)) * len(tile_starts(size[1], 8, 3))


def test_the_pipeline_decodes_in_tiles(small_checkpoint, monkeypatch):
    """Of 1024 pixels; here of fewer, so that a small picture has several."""
    assert decode_tiled.__defaults__[0] == 128
    monkeypatch.setattr(decode_tiled, "__defaults__", (8, 3))
    pipe, calls = KolorsPipeline.from_pretrained(small_checkpoint), Calls(monkeypatch, "decode")
    whole = draw(pipe, height=96, width=64, tiled_decoding=False)
    assert len(calls.dtypes) == 1
    tiled = draw(pipe, height=96, width=64, tiled_decoding=True)
    assert len(calls.dtypes) == 1 + 2
    assert 1e-4 < (tiled - whole).abs().mean() < 0.1


def test_one_black_picture_among_others(small_checkpoint, monkeypatch):
    pipe = KolorsPipeline.from_pretrained(small_checkpoint)
    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda vae, x: decode(vae, x) if x.mean() > 0 else -torch.ones(1, 3, 32, 32))
    x = torch.ones(2, 4, 4, 4)
    pipe.decode(x)
    x[1] = -1
    with pytest.raises(FloatingPointError, match="all-black picture"):
        pipe.decode(x)


def test_one_tile_is_the_whole(small_checkpoint, monkeypatch):
    """Up to 1024 pixels nothing changes."""
    pipe = KolorsPipeline.from_pretrained(small_checkpoint)
    assert torch.equal(draw(pipe, tiled_decoding=True), draw(pipe))
    calls = Calls(monkeypatch, "decode")
    x = latents(1, 4, 6, 5)
    assert torch.equal(decode_tiled(pipe.vae, x), pipe.vae.decode(x))
    assert len(calls.dtypes) == 2


def test_tiles_are_close_to_the_whole():
    """Where statistics hardly differ from tile to tile, neither does the picture; a seam would show in the gradient."""
    vae, x = small_vae(), latents(1, 4, 24, 40, seed=1)
    whole, tiled = vae.decode(x), decode_tiled(vae, x, tile=16, overlap=8)
    error = (tiled - whole).abs().mean() / whole.std()
    assert 1e-4 < error < 0.25
    for axis in (2, 3):
        assert tiled.diff(dim=axis).abs().max() < 1.2 * whole.diff(dim=axis).abs().max()
