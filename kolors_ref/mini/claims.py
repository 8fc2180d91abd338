"""What a caption claims: the facts that must be true of a picture, whatever else it shows of itself.

A claim speaks of every thing in the picture, but not of every fact: what it leaves open is free.
"""

from dataclasses import dataclass, replace
from itertools import combinations, pairwise, permutations

import numpy as np

from .scenes import pick, shuffle
from .world import RELATIONS, Scene, Thing, related


@dataclass(frozen=True)
class Description:
    """What is said of one thing, or of `count` alike; None leaves a fact open. `places` are none, or one for each."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    places: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Relation:
    """Description number `subject` is left of (right of, above, below, inside, around) description number `other`."""

    subject: int
    name: str
    other: int


@dataclass(frozen=True)
class Claim:
    """What must be true of a picture: its things, all of them; relations between them; the background if not None."""

    things: tuple[Description, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None


def holds(claim: Claim, scene: Scene) -> bool:
    """Says whether a scene has exactly the claimed things: some assignment of them makes every fact true."""
    if claim.background not in (None, scene.background):
        return False
    singles, number = [], []  # one description for each thing, and the claim's number of it
    for i, described in enumerate(claim.things):
        places = [(place,) for place in described.places] or [()] * described.count
        singles += [replace(described, places=place, count=1) for place in places]
        number += [i] * described.count
    if len(singles) != len(scene.things):
        return False
    for things in permutations(scene.things):
        if all(map(_matches, singles, things)) and all(
            related(a, relation.name, b)
            for relation in claim.relations
            for a, i in zip(things, number, strict=True)
            for b, j in zip(things, number, strict=True)
            if (i, j) == (relation.subject, relation.other)
        ):
            return True
    return False


def _matches(described: Description, thing: Thing) -> bool:
    """Says whether a thing has every attribute that is described."""
    return (
        described.shape in (None, thing.shape)
        and described.colour in (None, thing.colour)
        and described.size in (None, thing.size)
        and described.texture in (None, thing.texture)
        and (not described.places or thing.place in described.places)
    )


def choose_claim(scene: Scene, rng: np.random.Generator, dense: bool = False) -> Claim:
    """Draws what to say of a scene: everything if dense, else shapes, most colours, and some of the rest.

    Outlines and stripes are nearly always named; filled, the default, is seldom named in a short caption.
    Short captions mostly leave open where things stand, for that is how people ask; the right number of things is then
    hardest to draw.
    """
    groups = _groups(scene)
    if dense:
        nesting = _nesting(groups)
        things = [_describe(group, True, True, True, True) for group in groups]
        if nesting:
            things[0] = replace(things[0], places=())  # the place of what is around it says it
        return Claim(tuple(things), nesting, scene.background)
    background = scene.background if rng.random() < 0.3 else None
    relations = _relations(groups, rng)
    shapes_differ = len({group[0].shape for group in groups}) == len(groups)
    colour = not shapes_differ or rng.random() < 0.88
    size = rng.random() < 0.4
    textures = [rng.random() < (0.1 if group[0].texture == "filled" else 0.9) for group in groups]
    place = not relations and rng.random() < 0.3
    things = tuple(
        _describe(group, colour, size, texture, place) for group, texture in zip(groups, textures, strict=True)
    )
    if len(things) == 1 and colour and rng.random() < 0.04:
        things = (replace(things[0], shape=None),)
    return Claim(things, relations, background)


def shuffled(claim: Claim, rng: np.random.Generator) -> Claim:
    """The same claim with its things in another order."""
    order = shuffle(rng, range(len(claim.things)))
    relations = tuple(
        replace(relation, subject=order.index(relation.subject), other=order.index(relation.other))
        for relation in claim.relations
    )
    return replace(claim, things=tuple(claim.things[i] for i in order), relations=relations)


def _groups(scene: Scene) -> list[list[Thing]]:
    """The things of a scene, those alike together."""
    groups: dict[tuple[str, ...], list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault((thing.shape, thing.colour, thing.size, thing.texture), []).append(thing)
    return list(groups.values())


def _describe(group: list[Thing], colour: bool, size: bool, texture: bool, place: bool) -> Description:
    """Describes things that are alike by their shape, their number, and such other attributes as are wanted."""
    first = group[0]
    return Description(
        first.shape,
        first.colour if colour else None,
        first.size if size else None,
        first.texture if texture else None,
        tuple(thing.place for thing in group) if place else (),
        len(group),
    )


def _nesting(groups: list[list[Thing]]) -> tuple[Relation, ...]:
    """The relation of a thing inside another, if there is one."""
    if len(groups) == 2 and related(groups[0][0], "inside", groups[1][0]):
        return (Relation(0, "inside", 1),)
    return ()


def _relations(groups: list[list[Thing]], rng: np.random.Generator) -> tuple[Relation, ...]:
    """Draws the relations to speak of: of two things that stand clearly so, or of three in a row or column."""
    if len(groups) < 2 or any(len(group) > 1 for group in groups):
        return ()
    things = [group[0] for group in groups]
    if nesting := _nesting(groups):
        return nesting if rng.random() < 0.5 else (Relation(1, "around", 0),)
    name = next((n for n in ("left of", "above") if all(_clearly(a, n, b) for a, b in combinations(things, 2))), None)
    if name is None or rng.random() < 0.5:
        return ()
    order = sorted(range(len(things)), key=lambda i: things[i].x if name == "left of" else things[i].y)
    if pick(rng, (False, True)):
        order, name = order[::-1], RELATIONS[name]
    return tuple(Relation(a, name, b) for a, b in pairwise(order))


def _clearly(a: Thing, name: str, b: Thing) -> bool:
    """Says whether a relation or its inverse holds with room to spare, so that nobody would name another direction."""
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    along, across = (dx, dy) if name == "left of" else (dy, dx)
    return (related(a, name, b) or related(b, name, a)) and along >= 20 and along >= 2 * across
