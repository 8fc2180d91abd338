"""Sampling scenes: layouts, attributes and positions, all from one random stream.

Only `Generator.random` is used: numpy guarantees the stream of PCG64, but not the algorithms of `choice` and its kin,
so scene i of a seed stays the same on every machine and under every version.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

from .world import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    CONTAINERS,
    MIN_CONTRAST,
    PLACES,
    SHAPES,
    SIZES,
    SLENDER,
    TEXTURES,
    Scene,
    Thing,
    contrast,
    related,
)

LAYOUTS = {"single": 0.35, "row": 0.15, "column": 0.15, "nested": 0.1, "alike": 0.15, "free": 0.1}
"""How often things stand alone, beside each other, one over the other, one in the other, as copies, or anywhere."""
GAP = 5.0
"""The least number of pixels between a thing and the edge and, doubled in clean scenes, between two things."""

T = TypeVar("T")
Look = tuple[str, str, str, str]  # shape, colour, size, texture


def generator(seed: int, index: int) -> np.random.Generator:
    """The random stream of item `index` of a seed: the same everywhere, and independent of every other item's."""
    return np.random.Generator(np.random.PCG64((seed, index)))


def pick(rng: np.random.Generator, items: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """Draws one of the items, evenly or by weight."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    bounds = np.cumsum(weights)
    return items[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]


def shuffle(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The items in an order drawn by lot."""
    return [items[i] for i in sorted(range(len(items)), key=[rng.random() for _ in items].__getitem__)]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draws a number from a range, to a tenth."""
    return round(low + (high - low) * rng.random(), 1)


def sample_scene(
    rng: np.random.Generator, held_out: bool = False, clean: bool = False, layout: str | None = None
) -> Scene:
    """Draws a scene, its layout too if none of `LAYOUTS` is given.

    With `held_out`, its first thing has a combination of attributes that training never shows; without, none has.
    A clean scene, for quality tuning, is drawn upright in the exact sizes and colours, with rows and columns in line
    and wide gaps; any other is a little turned, scaled, shaded and shifted.
    """
    layout = layout or pick(rng, tuple(LAYOUTS), tuple(LAYOUTS.values()))
    while True:  # about half of the proposals fit
        background = pick(rng, tuple(BACKGROUNDS))
        looks = _sample_looks(rng, layout, background, held_out)
        things = _arrange(rng, layout, looks, clean)
        if _fits(things, layout, clean):
            return Scene(background, tuple(things))


def _sample_looks(rng: np.random.Generator, layout: str, background: str, held_out: bool) -> list[Look]:
    """Draws the shape, colour, size and texture of each thing; no two share shape and colour unless alike or nested."""
    behind = BACKGROUNDS[background]
    if layout == "single":
        return [_sample_look(rng, behind, held_out, size=pick(rng, tuple(SIZES), (1, 2, 2)))]
    if layout == "nested":
        outer = _sample_look(rng, behind, False, pick(rng, CONTAINERS), "large", pick(rng, ("filled", "outline")))
        while True:  # the inner thing must not look like a hole either
            inner = _sample_look(rng, behind, held_out, size="small")
            if outer[3] == "outline" or contrast(COLOURS[inner[1]], COLOURS[outer[1]]) >= MIN_CONTRAST:
                return [inner, outer]
    count = 2 + (rng.random() < 0.6)
    if layout == "alike":
        return [_sample_look(rng, behind, held_out, size=pick(rng, ("small", "medium")))] * count
    sizes = tuple(SIZES) if count == 2 else ("small", "small", "medium")  # three have no room for more
    looks = [_sample_look(rng, behind, held_out, size=pick(rng, sizes))]
    while len(looks) < count:
        look = _sample_look(rng, behind, False, size=pick(rng, sizes))
        if all(look[:2] != other[:2] for other in looks):
            looks.append(look)
    return looks


def _sample_look(
    rng: np.random.Generator,
    behind: tuple[int, int, int],
    held_out: bool,
    shape: str | None = None,
    size: str | None = None,
    texture: str | None = None,
) -> Look:
    """Draws what is not given until the thing stands out from what lies behind it and shows its texture."""
    while True:
        colour, a_shape, a_size = pick(rng, tuple(COLOURS)), shape or pick(rng, SHAPES), size or pick(rng, tuple(SIZES))
        roomy = a_size == "large" or (a_size == "medium" and a_shape not in SLENDER)
        a_texture = texture or (pick(rng, TEXTURES, (0.4, 0.3, 0.3)) if roomy else "filled")
        look = (a_shape, colour, a_size, a_texture)
        if contrast(COLOURS[colour], behind) >= MIN_CONTRAST and Thing(*look, 0, 0, 0).held_out == held_out:
            return look


def _arrange(rng: np.random.Generator, layout: str, looks: list[Look], clean: bool) -> list[Thing]:
    """Gives every look its extent, and a position in a cell of the grid of places."""
    form = pick(rng, ("row", "column", "free")) if layout == "alike" else layout
    extents = [SIZES[look[2]] * (1.0 if clean else 0.95 + 0.1 * rng.random()) for look in looks]
    if layout == "alike":
        extents = extents[:1] * len(looks)
    things = []
    for look, extent, (column, row) in zip(looks, extents, _cells(rng, form, len(looks)), strict=True):
        x, y = _coordinate(rng, column, extent, clean), _coordinate(rng, row, extent, clean)
        drift = 0.0 if clean else 3.0
        if things and form in ("column", "nested"):
            x = round(things[0].x + between(rng, -drift, drift), 1)
        if things and form in ("row", "nested"):
            y = round(things[0].y + between(rng, -drift, drift), 1)
        angle, shade = (0.0, 0.0) if clean else (between(rng, -7, 7), round(0.12 * rng.random() - 0.06, 2))
        things.append(Thing(*look, x, y, round(extent, 1), angle, shade))
    return things


def _cells(rng: np.random.Generator, form: str, count: int) -> list[tuple[int, int]]:
    """Draws the cells of the grid of places, as (column, row), that the things stand in."""
    cells = list(PLACES.values())
    if form == "nested":
        return [pick(rng, cells)] * count
    if form in ("row", "column"):
        line = pick(rng, (0, 1, 1, 2))
        order = [0, 1, 2] if count == 3 else pick(rng, ([0, 1], [1, 2], [0, 2], [0, 2]))
        order = order[:: pick(rng, (1, -1))]
        return [(k, line) if form == "row" else (line, k) for k in order]
    return [cells.pop(int(rng.random() * len(cells))) for _ in range(count)]


def _coordinate(rng: np.random.Generator, cell: int, extent: float, clean: bool) -> float:
    """Draws a coordinate of a centre within column or row `cell` of the grid."""
    if cell == 1:
        return between(rng, 59, 69) if clean else between(rng, 55, 73)
    near = between(rng, extent / 2 + (2 * GAP if clean else GAP), 42)
    return near if cell == 0 else round(CANVAS - near, 1)


def _fits(things: list[Thing], layout: str, clean: bool) -> bool:
    """Says whether things keep clear of the edge, of the lines between places, and of each other (but when nested)."""
    gap = 2 * GAP if clean else GAP
    for thing in things:
        for v in (thing.x, thing.y):
            if min(v, CANVAS - v) < thing.extent / 2 + GAP or min(abs(v - CANVAS * k / 8) for k in (3, 5)) < 3:
                return False
    if layout == "nested":
        return related(things[0], "inside", things[1])
    return all(
        max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.extent + b.extent) / 2 + gap for a, b in combinations(things, 2)
    )
