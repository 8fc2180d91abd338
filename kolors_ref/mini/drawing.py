"""Scenes as pictures: every shape is a polygon, drawn at four times the size and averaged down."""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .world import BACKGROUNDS, CANVAS, COLOURS, Scene, Thing

SUPERSAMPLING = 4
STROKE = {"outline": 4.0, "striped": 3.0}
"""Pixels across the line around a thing that is not filled."""
STRIPE = 5.0
"""Pixels across a stripe, and across the gap between two."""


def render(scene: Scene) -> Image.Image:
    """Draws a scene as an RGB picture of 128 x 128 pixels; the largest thing lies at the back."""
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUNDS[scene.background])
    for thing in sorted(scene.things, key=lambda t: -t.extent):
        mask, corner = _coverage(thing)
        colour = tuple(min(255, round(c * (1 + thing.shade))) for c in COLOURS[thing.colour])
        image.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return image


def _coverage(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """How much of each pixel a thing covers (an L picture, 255 for all of it), and the picture's top left corner."""
    points = turned(polygon(thing.shape), thing.angle) * thing.extent + (thing.x, thing.y)
    left, top = (math.floor(v) - 1 for v in points.min(axis=0))
    width, height = (math.ceil(v) + 1 - c for v, c in zip(points.max(axis=0), (left, top), strict=True))
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    points = (points - (left, top)) * SUPERSAMPLING
    corners = [tuple(p) for p in points]
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    if thing.texture != "filled":
        ink = Image.new("L", size)
        # Half of the line falls outside the shape and is cut off: what is left is the stroke.
        width = round(2 * STROKE[thing.texture] * SUPERSAMPLING)
        ImageDraw.Draw(ink).line(corners + corners[:2], fill=255, width=width, joint="curve")
        if thing.texture == "striped":
            _stripe(ink, (thing.y - top) * SUPERSAMPLING)
        mask = ImageChops.darker(mask, ink)
    return mask.reduce(SUPERSAMPLING), (left, top)


def _stripe(ink: Image.Image, centre: float) -> None:
    """Draws horizontal stripes all over the picture, one of them centred at a height."""
    draw, width = ImageDraw.Draw(ink), STRIPE * SUPERSAMPLING
    count = math.ceil(ink.height / width)
    for k in range(-count, count + 1):
        y = centre + 2 * k * width
        draw.rectangle((0, y - width / 2, ink.width, y + width / 2 - 1), fill=255)


def turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Turns points (N, 2) clockwise around the origin, as seen with y pointing down."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


@cache
def polygon(shape: str) -> np.ndarray:
    """The corners (N, 2) of a shape, y pointing down, its bounding box centred at 0 and 1 along the longer side."""
    points = np.array(_CORNERS[shape](), dtype=float)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high - low).max()
    points.flags.writeable = False
    return points


# --- The shapes, of any size and anywhere ---


def _arc(start: float, stop: float, radius: float = 1.0, x: float = 0.0) -> list[tuple[float, float]]:
    """49 points of a circle around (x, 0), between two angles in degrees."""
    angles = np.radians(np.linspace(start, stop, 49))
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    angles = np.radians(np.arange(10) * 36 - 90)
    return [((1, 0.5)[i % 2] * math.cos(a), (1, 0.5)[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _cross() -> list[tuple[float, float]]:
    quarter = np.array([(-0.36, -1), (0.36, -1), (0.36, -0.36)])
    return np.concatenate([turned(quarter, 90 * k) for k in range(4)]).tolist()


def _heart() -> list[tuple[float, float]]:
    angles = np.radians(np.linspace(0, 360, 72, endpoint=False))
    height = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(16 * math.sin(a) ** 3, -h) for a, h in zip(angles, height, strict=True)]


def _crescent() -> list[tuple[float, float]]:
    """A disc of radius 1 without a disc of radius 0.8, half a unit to its right."""
    radius, shift = 0.8, 0.5
    meet = (1 - radius**2 + shift**2) / (2 * shift)
    outer = math.degrees(math.acos(meet))
    inner = math.degrees(math.acos((meet - shift) / radius))
    return _arc(outer, 360 - outer) + _arc(360 - inner, inner, radius, shift)


_CORNERS = {
    "circle": lambda: _arc(0, 360)[:-1],
    "square": lambda: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": lambda: [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": lambda: [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
    "semicircle": lambda: _arc(180, 360),
}
