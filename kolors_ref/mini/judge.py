"""The judge: reads a picture of the small world back into a scene, and checks it against a claim.

Classical image analysis, no learning: what differs from the background is split into parts by connectivity and colour;
each part's outer shape is compared with templates, and its inside with what the textures would show there.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from .claims import Claim, holds
from .drawing import render
from .vision import bounding_box, components, dilate, erode, fill_holes, smooth
from .world import BACKGROUNDS, CANVAS, COLOURS, SHAPES, SIZES, Scene, Thing

UNKNOWN = "unknown"
"""The shape of a thing that is none of the world's."""
MIN_AREA = 60
"""Pixels below which a part of the picture is a speck and no thing."""
MIN_DIFFERENCE = 42.0
"""The distance in RGB from the background at which a pixel may belong to a thing."""
MIN_STRENGTH = 55.0
"""The distance in RGB from the background that the stronger pixels of a thing must reach: else it is a stain."""
MIN_OVERLAP = 0.72
"""The overlap (intersection over union) with the best template below which a shape is unknown."""
GRID = 32
"""Templates are GRID x GRID pixels."""


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds for a picture, and what was read in the picture."""

    holds: bool
    reading: Scene

    def __bool__(self) -> bool:
        return self.holds


def judge(image: Image.Image | np.ndarray, claim: Claim) -> Verdict:
    """Says whether what a claim demands is true of a picture: a PIL image or an array as `read` takes it."""
    reading = read(image)
    return Verdict(holds(claim, reading), reading)


def read(image: Image.Image | np.ndarray) -> Scene:
    """Reads a picture back into the scene it shows, the things from left to right.

    The picture is a PIL image, or an array (H, W, 3) of bytes or of floats in [0, 1]; of another size than 128 x 128 it
    is scaled. Raises ValueError for an array of another shape.
    """
    pixels = smooth(_pixels(image))
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[3:-3, 3:-3] = False
    behind = np.median(pixels[frame], axis=0)
    background = min(BACKGROUNDS, key=lambda name: np.linalg.norm(behind - BACKGROUNDS[name]))
    labels, count = components(np.linalg.norm(pixels - behind, axis=2) > MIN_DIFFERENCE)
    things = []
    for part in range(1, count + 1):
        mask = labels == part
        if mask.sum() >= MIN_AREA:
            left, top, right, bottom = bounding_box(mask)
            near = np.s_[top:bottom, left:right]
            found = _read_part(pixels[near], behind, mask[near])
            things += [replace(thing, x=thing.x + left, y=thing.y + top) for thing in found]
    return Scene(background, tuple(sorted(things, key=lambda t: (t.x, t.y))))


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as floats (128, 128, 3) in [0, 255]."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"the judge reads arrays of the shape (H, W, 3), not {image.shape}")
        if image.dtype != np.uint8:
            image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float64)


def _read_part(pixels: np.ndarray, behind: np.ndarray, mask: np.ndarray) -> list[Thing]:
    """Reads one connected part of the foreground (H, W): one thing, or several that touch, each of its own colour."""
    distance = np.sqrt(np.maximum(_distances(pixels, behind[None])[..., 0], 0))
    strong = mask & (distance >= np.quantile(distance[mask], 0.7))
    if distance[strong].mean() < MIN_STRENGTH:
        return []
    colours = _flat_colours(pixels, behind, mask)
    if len(colours) < 2:
        colours = [pixels[strong].mean(axis=0)]
    nearest = np.argmin(_distances(pixels, np.array(colours)), axis=2)
    blobs = []
    for i, colour in enumerate(colours):
        way = colour - behind
        cover = np.clip((pixels - behind) @ way / (way @ way), 0, 1) * (mask & (nearest == i))
        if len(colours) == 1:
            blobs.append((cover, colour))
            continue
        labels, count = components(cover > 0.5)
        pieces = [labels == k for k in range(1, count + 1)]
        # The seam between a third colour and the background can have this colour's name: it is thin.
        blobs += [(cover * piece, colour) for piece in pieces if piece.sum() >= MIN_AREA and erode(piece, 2).any()]
    things, taken = [], np.zeros_like(mask)
    for cover, colour in sorted(blobs, key=lambda blob: blob[0].sum()):
        if (cover > 0.5).sum() >= MIN_AREA / 2:
            things.append(_read_thing(cover, _colour_name(colour, behind), taken))
            taken |= cover > 0.5
    return things


def _flat_colours(pixels: np.ndarray, behind: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The mean of each named colour that fills at least six squares of 5 x 5 pixels in the mask, overlapping or not.

    Where two colours meet, their mixture can have a third one's name: mostly in too thin a seam to hold such squares.
    A mixture with the background, as between stripes, must fill a square of 7 x 7 to be a colour of its own.
    """
    names = np.argmin(_distances(pixels, np.array(list(COLOURS.values()))), axis=2)
    cores = [erode(mask & (names == name), 2) for name in range(len(COLOURS))]
    cores = [core for core in cores if core.sum() >= 6]
    means = [pixels[core].mean(axis=0) for core in cores]

    def mixed(mean: np.ndarray) -> bool:
        mixtures = (_mixture(mean, behind, other) for other in means if other is not mean)
        return any(share < 0.9 and distance < 25 for share, distance in mixtures)

    return [mean for mean, core in zip(means, cores, strict=True) if erode(core).any() or not mixed(mean)]


def _distances(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The squared distance (H, W, N) of each pixel (H, W, 3) from each of the colours (N, 3)."""
    return (pixels**2).sum(axis=2)[..., None] - 2 * pixels @ colours.T + (colours**2).sum(axis=1)


def _colour_name(colour: np.ndarray, behind: np.ndarray) -> str:
    """The name of a colour that thin strokes may show only in part, mixed with what lies behind them."""

    def mismatch(name: str) -> float:
        share, distance = _mixture(colour, behind, np.array(COLOURS[name], dtype=float))
        return distance + 40 * (1 - share)

    visible = [name for name, value in COLOURS.items() if np.linalg.norm(behind - value) > MIN_DIFFERENCE]
    return min(visible, key=mismatch)


def _mixture(colour: np.ndarray, behind: np.ndarray, ink: np.ndarray) -> tuple[float, float]:
    """The share of ink in the mixture of ink and background that is nearest to a colour, and how far off that is."""
    way = ink - behind
    share = float(np.clip((colour - behind) @ way / (way @ way), 0, 1))
    return share, float(np.linalg.norm(behind + share * way - colour))


def _read_thing(cover: np.ndarray, colour: str, taken: np.ndarray) -> Thing:
    """Reads one thing off how much of its colour each pixel (H, W) shows; `taken` is other things, maybe inside it."""
    ink = cover > 0.5
    whole = fill_holes(ink)
    left, top, right, bottom = bounding_box(whole)
    extent = max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    size = min(SIZES, key=lambda name: abs(np.log(extent / SIZES[name])))
    shape = _shape(_portrait(np.where(erode(whole), 1.0, cover)), size)
    return Thing(shape, colour, size, _texture(ink, whole, taken), x, y, extent)


def _portrait(cover: np.ndarray) -> np.ndarray:
    """The square around the pixels (H, W) of more than half cover, scaled bilinearly to GRID x GRID and flattened."""
    left, top, right, bottom = bounding_box(cover > 0.5)
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    image = Image.fromarray(cover.astype(np.float32))
    corners = (x - half, y - half, x + half, y + half)
    scale = 2 * half / GRID
    matrix = (scale, 0, corners[0], 0, scale, corners[1])
    return np.asarray(image.transform((GRID, GRID), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)).ravel()


def _shape(portrait: np.ndarray, size: str) -> str:
    """The shape with the template of a size that overlaps best with a portrait."""
    names, templates = _templates(size)
    overlaps = np.minimum(templates, portrait).sum(axis=1) / np.maximum(templates, portrait).sum(axis=1)
    best = int(np.argmax(overlaps))
    return names[best] if overlaps[best] >= MIN_OVERLAP else UNKNOWN


@cache
def _templates(size: str) -> tuple[list[str], np.ndarray]:
    """Every shape in a size, at several angles and two blurs: the names, and the portraits (N, GRID * GRID)."""
    names, portraits = [], []
    for shape, angle in product(SHAPES, (-7.0, -3.5, 0.0, 3.5, 7.0)):
        thing = Thing(shape, "black", size, "filled", CANVAS / 2, CANVAS / 2, SIZES[size], angle)
        cover = 1 - np.asarray(render(Scene("white", (thing,))), dtype=float) / 255
        cover = np.clip(cover / cover.max(), 0, 1)
        for _ in range(2):
            cover = smooth(smooth(cover))
            names.append(shape)
            portraits.append(_portrait(cover[..., 0]))
    return names, np.array(portraits)


def _texture(ink: np.ndarray, whole: np.ndarray, taken: np.ndarray) -> str:
    """The texture of a thing, by how much of its inside, away from its edge, has its colour."""
    inside = next(m for m in (erode(whole, k) for k in (5, 4, 3, 2, 1, 0)) if m.sum() >= 16)
    inside &= ~dilate(taken, 2)
    share = ink[inside].mean() if inside.any() else 0.0
    return "filled" if share > 0.85 else "striped" if share > 0.15 else "outline"
