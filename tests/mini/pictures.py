"""What the tests of the small world share: scenes for any claim, and pictures as a model might soften them."""

import io

import numpy as np
from PIL import Image, ImageFilter

from kolors_ref.mini.claims import Claim
from kolors_ref.mini.world import BACKGROUNDS, COLOURS, MIN_CONTRAST, PLACES, SIZES, Scene, Thing, contrast

LINE = (24.0, 64.0, 104.0)


def scene_for(claim: Claim) -> Scene:
    """Builds a scene that is what a claim says, with the plainest choice wherever the claim leaves one."""
    described = [(thing, i) for thing in claim.things for i in range(thing.count)]
    spots = [(LINE[0 if k == 0 else 2 if k == 1 else 1], 64.0) for k in range(len(described))]
    sizes = [thing.size or ("small" if len(described) > 2 else "medium") for thing, _ in described]
    for relation in claim.relations:
        here, there = (24.0, 92.0) if relation.name in ("left of", "above") else (92.0, 24.0)
        spots = [(here, 64.0), (there, 64.0)] if "of" in relation.name else [(64.0, here), (64.0, there)]
        if relation.name == "inside":
            spots, sizes = [(64.0, 64.0)] * 2, ["small", "large"]
    things = []
    for (thing, i), (x, y), size in zip(described, spots, sizes, strict=True):
        if thing.places:
            x, y = (LINE[cell] for cell in PLACES[thing.places[i]])
        if thing.texture not in (None, "filled"):
            size = "large"
        colour = thing.colour or ("red", "blue", "black")[len(things)]
        x, y = (min(max(v, SIZES[size] / 2 + 4), 124 - SIZES[size] / 2) for v in (x, y))
        things.append(Thing(thing.shape, colour, size, thing.texture or "filled", x, y, SIZES[size]))
    background = claim.background or next(
        name
        for name, value in BACKGROUNDS.items()
        if all(contrast(COLOURS[thing.colour], value) >= MIN_CONTRAST for thing in things)
    )
    return Scene(background, tuple(things))


def blurred(image, rng):
    return image.filter(ImageFilter.GaussianBlur(1.2))


def noisy(image, rng):
    pixels = np.asarray(image) + rng.normal(0, 12, (image.height, image.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def shifted(image, rng):
    """Another brightness, and another tint."""
    pixels = np.asarray(image) * rng.uniform(0.95, 1.05) + rng.uniform(-10, 10, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def compressed(image, rng):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def softened(image, rng):
    """A little of everything."""
    return compressed(noisy(shifted(image.filter(ImageFilter.GaussianBlur(1)), rng), rng), rng)
