"""What the decoder of the autoencoder learns from when it learns alone."""

import pytest
import torch
from test_train_stages import HERE, VAE, seeded

from kolors_ref.mini import autoencoder
from kolors_ref.mini.autoencoder import MARGIN, NEAR, AutoencoderLoss, DecoderLoss, decoder_batches, nearness
from kolors_ref.mini.scenes import generator, sample_scene
from kolors_ref.mini.world import Scene, Thing, related


@pytest.fixture(scope="module")
def vae():
    return seeded(AutoencoderLoss, VAE).vae


def test_pixels_near_a_thing_count_more():
    """Within five pixels of what stands around it; in the mean a pixel counts 1."""
    weight = nearness(Scene("white", (Thing("circle", "red", "small", "filled", 40.0, 60.0, 24.0),)))
    near, far = weight[0, 60, 40], weight[0, 0, 0]
    assert (weight.shape, round((near / far).item(), 3)) == ((1, 128, 128), NEAR)
    assert weight.mean().item() == pytest.approx(1)
    assert torch.equal(weight[0] == near, box(40, 60, 12 + int(MARGIN)))


def box(x, y, reach):
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[y - reach : y + reach, x - reach : x + reach] = True
    return inside


def test_what_is_around_a_thing_counts_no_more_than_the_background():
    outer = Thing("square", "blue", "large", "filled", 64.0, 64.0, 58.0)
    inner = Thing("star", "red", "small", "filled", 64.0, 64.0, 24.0)
    assert torch.equal(nearness(Scene("white", (inner, outer))), nearness(Scene("white", (inner,))))
    assert not torch.equal(nearness(Scene("white", (outer,))), nearness(Scene("white", (inner,))))


def test_a_layout_can_be_asked_for():
    scenes = [sample_scene(generator(0, index), layout="nested") for index in range(40)]
    assert all(related(scene.things[0], "inside", scene.things[1]) for scene in scenes)


def test_half_of_the_pictures_have_a_thing_inside_another(vae, monkeypatch):
    asked = []
    monkeypatch.setattr(autoencoder, "sample_scene", lambda rng, layout: asked.append(layout) or sample_scene(rng))
    decoder_batches(0, vae, HERE)(range(100))
    assert 35 < asked.count("nested") < 65
    assert set(asked) == {"nested", None}


def test_a_batch_is_made_from_its_numbers_alone(vae):
    batch = decoder_batches(0, vae, HERE)
    latents, pictures, weight = batch(range(2, 6))
    assert (latents.shape, pictures.shape, weight.shape) == ((4, 4, 16, 16), (4, 3, 128, 128), (4, 1, 128, 128))
    others = zip(batch(range(2, 6, 2)), batch(range(3, 6, 2)), strict=True)
    for whole, parts in zip((latents, pictures, weight), others, strict=True):
        for part, mine in zip(parts, (whole[0::2], whole[1::2]), strict=True):
            torch.testing.assert_close(part, mine, rtol=2e-2, atol=2e-2)


def test_the_loss_is_the_weighted_error_of_what_the_whole_autoencoder_decodes(vae):
    latents, pictures, weight = decoder_batches(0, vae, HERE)(range(3))
    with torch.no_grad():
        error = vae.decode(latents * vae.config.scaling_factor) - pictures
        loss = DecoderLoss(vae)(latents, pictures, weight)
    assert loss.item() == pytest.approx((weight * (error.abs() + error**2)).mean().item(), rel=1e-5)


def test_nothing_of_the_encoder_learns(vae):
    names = {name.partition(".")[0] for name, _ in DecoderLoss(vae).named_parameters()}
    assert names == {"post_quant_conv", "decoder"}
