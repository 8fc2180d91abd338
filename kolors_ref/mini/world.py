"""The world of the miniature Kolors: one to three coloured shapes on a plain background, 128 x 128 pixels.

This file holds the vocabulary and the geometry: what a scene is, and which of its facts have a name.
"""

import math
from dataclasses import dataclass

CANVAS = 128
"""Pixels along one side of every picture."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "crescent", "semicircle")

COLOURS = {
    "red": (210, 30, 45),
    "orange": (243, 124, 18),
    "yellow": (250, 212, 40),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "purple": (132, 58, 178),
    "pink": (240, 98, 160),
    "brown": (115, 70, 40),
    "black": (28, 28, 30),
    "white": (250, 250, 250),
}
"""The colours of things, as RGB; no two are closer than 80."""

BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (28, 28, 30),
    "grey": (135, 140, 146),
    "light blue": (140, 196, 238),
    "light green": (150, 210, 150),
    "beige": (240, 222, 188),
}

SIZES = {"small": 24, "medium": 38, "large": 58}
"""Pixels along the longer side of a thing."""

TEXTURES = ("filled", "outline", "striped")

SLENDER = ("star", "cross", "crescent", "semicircle")
"""The shapes that are wide enough for an outline or stripes only when large; small things are always filled."""

PLACES = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
"""The nine places of a picture as (column, row) of a grid whose lines lie at 3/8 and 5/8 of the canvas."""

RELATIONS = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}
"""Each relation with its inverse."""

CONTAINERS = ("circle", "square")
"""The shapes that have room for any small thing inside, filled or in outline, when they are large."""

HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "black"),
        ("diamond", "red"),
        ("star", "green"),
        ("cross", "pink"),
        ("heart", "blue"),
        ("crescent", "brown"),
        ("semicircle", "yellow"),
    }
)
"""One colour of each shape that training never shows: a tenth of the 90 pairs."""

HELD_OUT_TEXTURES = frozenset({("diamond", "striped"), ("cross", "outline")})
"""Pairs of shape and texture that training never shows: two of the 18 whose texture is not filled."""

MIN_CONTRAST = 90.0
"""The least distance, in RGB, between a thing and what lies behind it."""


@dataclass(frozen=True)
class Thing:
    """One shape in a picture.

    `x`, `y` is the centre of its bounding box before it is turned and `extent` the box's longer side, all in pixels;
    `angle` turns it clockwise, in degrees; `shade` brightens (> 0) or darkens (< 0) its colour by that fraction.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    extent: float
    angle: float = 0.0
    shade: float = 0.0

    @property
    def place(self) -> str:
        """The name of the part of the picture that the centre lies in."""
        cell = tuple(0 if v < CANVAS * 3 / 8 else 1 if v < CANVAS * 5 / 8 else 2 for v in (self.x, self.y))
        return next(name for name, where in PLACES.items() if where == cell)

    @property
    def held_out(self) -> bool:
        """Whether training never shows this combination of attributes."""
        return (self.shape, self.colour) in HELD_OUT_COLOURS or (self.shape, self.texture) in HELD_OUT_TEXTURES


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a background and one to three things, none of which hides another."""

    background: str
    things: tuple[Thing, ...]


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Says whether a is left of, right of, above, below, inside or around b.

    For a direction the centres must lie at least 10 pixels apart along it, and no further apart across it.
    Raises KeyError for a relation that is not in `RELATIONS`.
    """
    dx, dy = b.x - a.x, b.y - a.y
    contained = math.hypot(dx, dy) + min(a.extent, b.extent) / 2 < max(a.extent, b.extent) / 2
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
        "inside": (b.extent - a.extent, 0.0),
        "around": (a.extent - b.extent, 0.0),
    }[relation]
    return contained == (relation in ("inside", "around")) and along >= 10 and along >= abs(across)


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """The distance of two colours in RGB."""
    return math.dist(a, b)
