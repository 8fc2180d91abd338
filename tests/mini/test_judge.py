"""The judge, held against pictures whose scene is known: sharp ones, and ones as soft as a model's."""

import time

import numpy as np
import pytest
from mini.pictures import blurred, compressed, noisy, shifted, softened
from PIL import Image

from kolors_ref.mini.claims import Claim, Description, holds
from kolors_ref.mini.data import example
from kolors_ref.mini.drawing import render
from kolors_ref.mini.judge import UNKNOWN, judge, read
from kolors_ref.mini.vision import bounding_box, components, dilate, erode, fill_holes
from kolors_ref.mini.world import Scene, Thing

EXAMPLES = [example(11, index, held_out=index % 4 == 0, clean=index % 5 == 0) for index in range(240)]
PICTURES = [one.image for one in EXAMPLES]


def facts(scene):
    """A scene as far as it can be read off a picture."""
    return scene.background, sorted((t.shape, t.colour, t.size, t.texture, t.place) for t in scene.things)


def test_reads_every_fact_of_sharp_pictures():
    right = sum(facts(read(image)) == facts(one.scene) for one, image in zip(EXAMPLES, PICTURES, strict=True))
    assert right / len(EXAMPLES) >= 0.99


def test_every_caption_holds_for_its_picture():
    right = sum(judge(image, one.claim).holds for one, image in zip(EXAMPLES, PICTURES, strict=True))
    assert right / len(EXAMPLES) >= 0.99


@pytest.mark.parametrize("spoil", [blurred, noisy, shifted, compressed, softened])
def test_every_caption_holds_for_spoilt_pictures(spoil):
    rng = np.random.default_rng(0)
    right = sum(judge(spoil(image, rng), one.claim).holds for one, image in zip(EXAMPLES, PICTURES, strict=True))
    assert right / len(EXAMPLES) >= 0.97


def test_captions_of_other_pictures_do_not_hold():
    """The judge accepts a claim for another scene's picture just where it is true of that scene: next to never."""
    others = EXAMPLES[1:101]
    accepted = [judge(other.image, one.claim).holds for one, other in zip(EXAMPLES, others, strict=False)]
    assert accepted == [holds(one.claim, other.scene) for one, other in zip(EXAMPLES, others, strict=False)]
    assert sum(accepted) <= 3


THING = Thing("star", "red", "medium", "filled", 40.0, 70.0, 38.0)


@pytest.mark.parametrize(
    "wrong",
    [
        Description("heart"),
        Description(colour="pink"),
        Description(size="large"),
        Description(texture="striped"),
        Description(places=("right",)),
        Description("star", count=2),
    ],
)
def test_a_single_wrong_fact_is_seen(wrong):
    image = render(Scene("beige", (THING,)))
    assert judge(image, Claim((Description("star", "red", "medium", "filled", ("left",)),), background="beige"))
    assert not judge(image, Claim((wrong,)))


def test_a_blank_picture_shows_nothing():
    reading = read(Image.new("RGB", (128, 128), "white"))
    assert reading == Scene("white", ())
    assert not judge(Image.new("RGB", (128, 128)), Claim((Description(),)))


@pytest.mark.parametrize("grain", [1, 2, 4, 8, 16, 32])
def test_pure_noise_fulfils_nothing(grain):
    """Whatever the size of the grains: no error, and no circle."""
    noise = np.random.default_rng(grain).random((128 // grain, 128 // grain, 3))
    noise = noise.repeat(grain, axis=0).repeat(grain, axis=1)
    assert not judge(noise, Claim((Description("circle"),)))
    assert not judge((noise + 3) / 4, Claim((Description("circle"),)))


def test_shapes_of_another_world_are_unknown():
    pixels = np.full((128, 128, 3), 250, dtype=np.uint8)
    pixels[40:48, 30:88] = (210, 30, 45)
    pixels[40:98, 30:38] = (210, 30, 45)
    (thing,) = read(pixels).things
    assert thing.shape == UNKNOWN
    assert thing.colour == "red"


@pytest.mark.parametrize("form", ["uint8", "float", "twice the size", "palette"])
def test_forms_of_a_picture(form):
    image = render(Scene("light blue", (THING,)))
    forms = {
        "uint8": np.asarray(image),
        "float": np.asarray(image) / 255,
        "twice the size": image.resize((256, 256)),
        "palette": image.convert("P"),
    }
    assert facts(read(forms[form])) == facts(Scene("light blue", (THING,)))


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(H, W, 3\), not \(3, 128, 128\)"):
        read(np.zeros((3, 128, 128)))


def test_a_picture_is_read_in_a_moment():
    read(PICTURES[0])  # draws the templates
    start = time.process_time()
    for image in PICTURES[:50]:
        assert read(image).things
    assert (time.process_time() - start) / 50 < 0.1  # 0.01 on a free core


# --- The image analysis below ---


def flood(mask):
    """Connected components by flooding from each pixel in turn: slow and plain."""
    labels, count = np.zeros(mask.shape, dtype=int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count, todo = count + 1, [start]
        while todo:
            y, x = todo.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return labels, count


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.6, 0.8, 1.0])
def test_components(density):
    mask = np.random.default_rng(1).random((40, 31)) < density
    (labels, count), (expected, number) = components(mask), flood(mask)
    assert count == number
    assert np.array_equal(labels > 0, mask)
    assert len(set(zip(labels[mask], expected[mask], strict=True))) == number


def test_holes_erosion_and_boxes():
    ring = np.zeros((9, 9), dtype=bool)
    ring[1:8, 2:9] = True
    ring[3:6, 4:7] = False
    full = fill_holes(ring)
    assert full.sum() == 49
    assert bounding_box(ring) == (2, 1, 9, 8)
    assert erode(full).sum() == 25
    assert np.array_equal(dilate(erode(full)), full)
