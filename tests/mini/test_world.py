"""The scenes of the small world: what is drawn by lot, what never is, and that it is the same everywhere."""

import hashlib
import time
from itertools import combinations, pairwise

import numpy as np
import pytest

from kolors_ref.mini.data import example, examples
from kolors_ref.mini.drawing import render
from kolors_ref.mini.scenes import generator, sample_scene
from kolors_ref.mini.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_TEXTURES,
    MIN_CONTRAST,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    contrast,
    related,
)

SCENES = [sample_scene(generator(0, index)) for index in range(2000)]
CLEAN = [sample_scene(generator(0, index), clean=True) for index in range(500)]


def nested(scene):
    return len(scene.things) == 2 and related(scene.things[0], "inside", scene.things[1])


def test_the_same_scenes_everywhere():
    """The digest was written down once: another machine, or another numpy, must draw the same scenes."""
    digest = hashlib.sha256(repr(SCENES[:500]).encode()).hexdigest()
    assert digest[:16] == "cc53cada9780660e"


def test_an_example_depends_on_its_seed_and_number_alone():
    assert example(3, 5) == example(3, 5)
    assert example(3, 5) != example(3, 6)
    assert example(3, 5) != example(4, 5)
    stream = examples(3)
    assert [next(stream), next(stream)] == [example(3, 0), example(3, 1)]
    assert np.array_equal(np.asarray(example(3, 5).image), np.asarray(render(example(3, 5).scene)))


def test_training_shows_everything_but_what_is_held_out():
    things = [thing for scene in SCENES for thing in scene.things]
    assert not any(thing.held_out for thing in things)
    pairs = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    assert {(thing.shape, thing.colour) for thing in things} == pairs - HELD_OUT_COLOURS
    pairs = {(shape, texture) for shape in SHAPES for texture in TEXTURES}
    assert {(thing.shape, thing.texture) for thing in things} == pairs - HELD_OUT_TEXTURES
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    assert {thing.size for thing in things} == set(SIZES)
    assert len({thing.place for thing in things}) == 9


def test_about_a_tenth_is_held_out():
    share = len(HELD_OUT_COLOURS | HELD_OUT_TEXTURES) / (len(SHAPES) * (len(COLOURS) + len(TEXTURES) - 1))
    assert 0.08 < share < 0.12


def test_held_out_scenes_hold_something_held_out():
    assert all(sample_scene(generator(1, index), held_out=True).things[0].held_out for index in range(200))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_numbers_of_things(count):
    share = sum(len(scene.things) == count for scene in SCENES) / len(SCENES)
    assert 0.2 < share < 0.45


def test_one_scene_in_ten_is_nested():
    assert 0.07 < sum(map(nested, SCENES)) / len(SCENES) < 0.13


@pytest.mark.parametrize(("scenes", "gap"), [(SCENES, 5.0), (CLEAN, 10.0)])
def test_things_keep_clear_of_each_other_and_of_the_edge(scenes, gap):
    for scene in scenes:
        for thing in scene.things:
            assert min(thing.x, thing.y, 128 - thing.x, 128 - thing.y) >= thing.extent / 2 + 5
            assert contrast(COLOURS[thing.colour], BACKGROUNDS[scene.background]) >= MIN_CONTRAST
        if not nested(scene):
            for a, b in combinations(scene.things, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.extent + b.extent) / 2 + gap


def test_clean_scenes_are_upright_and_exact():
    for scene in CLEAN:
        assert all(t.angle == 0 and t.shade == 0 and t.extent == SIZES[t.size] for t in scene.things)
    assert any(thing.angle for scene in SCENES[:20] for thing in scene.things)
    assert len({thing.x for scene in CLEAN for thing in scene.things}) > 200, "things stand anywhere in their places"


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_have_inverses(relation):
    things = [thing for scene in SCENES[:300] for thing in scene.things]
    pairs = list(pairwise(things))
    assert any(related(a, relation, b) for a, b in pairs) or relation in ("around", "inside")
    assert all(related(a, relation, b) == related(b, RELATIONS[relation], a) for a, b in pairs)


def test_a_thing_inside_another_has_no_direction_from_it():
    inner, outer = (
        Thing("star", "red", "small", "filled", 50, 64, 24),
        Thing("circle", "blue", "large", "filled", 64, 64, 58),
    )
    assert related(inner, "inside", outer)
    assert related(outer, "around", inner)
    assert not related(inner, "left of", outer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_drawn_things_have_their_extent_colour_and_centre(shape, size):
    thing = Thing(shape, "red", size, "filled", 60.0, 70.0, SIZES[size])
    pixels = np.asarray(render(Scene("white", (thing,)))).astype(int)
    cover = (250 - pixels[..., 1]) / (250 - COLOURS["red"][1])
    rows, columns = np.nonzero(cover.max(axis=1) > 0.5)[0], np.nonzero(cover.max(axis=0) > 0.5)[0]
    spans = [v[-1] - v[0] + 1 for v in (rows, columns)]
    assert max(spans) == pytest.approx(SIZES[size], abs=2.1)
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(60, abs=1.1)
    assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(70, abs=1.6)
    assert (pixels == COLOURS["red"]).all(axis=2).sum() > 60


def test_edges_are_smooth():
    thing = Thing("circle", "black", "large", "filled", 64.0, 64.0, 58.0)
    values = np.unique(np.asarray(render(Scene("white", (thing,))))[..., 0])
    assert len(values) > 8


def test_fifty_pictures_a_second():
    start = time.process_time()
    for index in range(100):
        assert example(9, index).image.size == (128, 128)
    assert time.process_time() - start < 2  # 0.3 on a free core
