"""MiniPrompts: a bilingual benchmark of the small world, balanced over what a prompt can ask for.

The categories are in the manner of KolorsPrompts (Kolors report), turned to what can be checked by
machine. Every prompt carries the claim that it makes; both languages ask for the same claims.
"""

from dataclasses import dataclass, replace

from .captions import LANGUAGES, word
from .claims import Claim, Description, Relation
from .scenes import generator
from .world import (
    BACKGROUNDS,
    COLOURS,
    CONTAINERS,
    HELD_OUT_COLOURS,
    HELD_OUT_TEXTURES,
    MIN_CONTRAST,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    contrast,
)

SEED = 2024
"""The seed of the wording."""
PER_CATEGORY = 24
"""Prompts of one category in one language."""


@dataclass(frozen=True)
class Prompt:
    """Prompt number `number` of the benchmark, with what must be true of a picture of it."""

    number: int
    text: str
    language: str
    category: str
    claim: Claim


def mini_prompts(language: str | None = None) -> list[Prompt]:
    """The benchmark, 240 prompts a language: always the same ones, in one language ("zh" or "en") or in both.

    Raises ValueError for another language.
    """
    if language not in (None, *LANGUAGES):
        raise ValueError(f"the language is {language!r}; MiniPrompts are in {' and '.join(LANGUAGES)}")
    prompts = []
    for number, (category, claim) in enumerate(_claims()):
        for i, spoken in enumerate(LANGUAGES):
            text = word(claim, generator(SEED, 2 * number + i), spoken)
            prompts.append(Prompt(len(prompts), text, spoken, category, claim))
    return [prompt for prompt in prompts if language in (None, prompt.language)]


def _claims() -> list[tuple[str, Claim]]:
    """Every category with its claims."""
    return [(category, make(k)) for category, make in CATEGORIES.items() for k in range(PER_CATEGORY)]


def _look(k: int) -> Description:
    """The k-th coloured shape that training shows, shapes and colours in even turns."""
    shape, colours = SHAPES[k % len(SHAPES)], list(COLOURS)
    colours = colours[7 * k % len(colours) :] + colours
    return Description(shape, next(colour for colour in colours if (shape, colour) not in HELD_OUT_COLOURS))


def _other(first: Description, k: int) -> Description:
    """The first look from the k-th on that differs from another in shape and stands out from it in colour."""
    return next(
        look
        for look in map(_look, range(k, k + 90))
        if look.shape != first.shape and contrast(COLOURS[look.colour], COLOURS[first.colour]) >= MIN_CONTRAST
    )


def _single(k: int) -> Claim:
    return Claim((_look(k),))


def _colour(k: int) -> Claim:
    """Two things, each with a colour that the other must not take."""
    return Claim((_look(k + 30), _other(_look(k + 30), k + 4)))


def _shape(k: int) -> Claim:
    """One or two shapes of any colour."""
    first = Description(SHAPES[k % 9])
    return Claim((first,) if k < 9 else (first, Description(SHAPES[(k + 1 + k // 3) % 9])))


def _size(k: int) -> Claim:
    """A size, or two sizes to be told apart."""
    sizes = list(SIZES)
    first = replace(_look(k + 3), size=sizes[k % 3])
    return Claim((first,) if k < 12 else (first, replace(_other(first, k + 8), size=sizes[(k + 1 + k % 2) % 3])))


def _position(k: int) -> Claim:
    """One thing in each of the nine places, twice over; then two things, each in its place."""
    places = list(PLACES)
    first = replace(_look(k + 5), places=(places[k % 9],))
    return Claim((first,) if k < 18 else (first, replace(_other(first, k + 12), places=(places[(k + 4) % 9],))))


def _relation(k: int) -> Claim:
    """Two things beside, over or in one another."""
    name = ("left of", "above", "right of", "below", "inside")[k % 5]
    other = _look(k + 20)
    if name == "inside":
        shape = CONTAINERS[k // 5 % len(CONTAINERS)]
        other = next(look for look in map(_look, range(k, k + 90)) if look.shape == shape)
    return Claim((_other(other, k + 1), other), (Relation(0, name, 1),))


def _count(k: int) -> Claim:
    return Claim((replace(_look(k + 7), count=2 + k % 2),))


def _background(k: int) -> Claim:
    name = list(BACKGROUNDS)[k % 6]
    visible = (
        look
        for look in map(_look, range(k + 11, k + 101))
        if contrast(COLOURS[look.colour], BACKGROUNDS[name]) >= MIN_CONTRAST
    )
    return Claim((next(visible),), background=name)


def _texture(k: int) -> Claim:
    texture = TEXTURES[k % 3]
    shown = (look for look in map(_look, range(k + k // 9, k + 99)) if (look.shape, texture) not in HELD_OUT_TEXTURES)
    return Claim((replace(next(shown), texture=texture),))


def _held_out(k: int) -> Claim:
    """Pairs of shape and colour that training never shows, without and with a place; then of shape and texture."""
    if k < 18:
        shape, colour = sorted(HELD_OUT_COLOURS)[k % 9]
        return Claim((Description(shape, colour, places=() if k < 9 else (list(PLACES)[k - 9],)),))
    shape, texture = sorted(HELD_OUT_TEXTURES)[k % 2]
    look = next(look for look in map(_look, range(9 * k, 9 * k + 90)) if look.shape == shape)
    return Claim((replace(look, texture=texture),))


CATEGORIES = {
    "single object": _single,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "position": _position,
    "relation": _relation,
    "count": _count,
    "background": _background,
    "texture": _texture,
    "held-out": _held_out,
}
"""The categories, each with the function that makes its k-th claim."""
