"""Claims in words, in Chinese and in English, in many phrasings; every fact of a claim is said, and nothing else."""

from dataclasses import dataclass

import numpy as np

from .claims import Claim, Description
from .scenes import pick
from .vocabulary import CHINESE, ENGLISH
from .world import RELATIONS

LANGUAGES = ("zh", "en")


def word(claim: Claim, rng: np.random.Generator, language: str) -> str:
    """Draws a way to say a claim. Raises ValueError for a language other than "zh" and "en"."""
    if language not in LANGUAGES:
        raise ValueError(f"captions are in the languages 'zh' and 'en', not {language!r}")
    speaker = (_Chinese if language == "zh" else _English)(rng)
    return speaker.say(claim)


@dataclass
class _English:
    """Says claims in English, drawing each word from a random stream."""

    rng: np.random.Generator

    def say(self, claim: Claim) -> str:
        """The whole claim: its things, their relations if it has any, and the background before or after."""
        core = self.related(claim) if claim.relations else self.listed(claim.things)
        framed = self.framed(core, claim.things[0].count)
        if claim.background is None:
            return framed
        ground = f"{article(self.of(claim.background))} background"
        sentence = f"the background is {self.of(claim.background)}"
        return pick(
            self.rng,
            (
                f"{framed} on {ground}",
                f"{core} against {ground}",
                f"{framed}, {self.of(claim.background)} background",
                f"on {ground}, {core}",
                f"{framed}, {sentence}",
            ),
        )

    def framed(self, core: str, count: int) -> str:
        """Mostly the bare phrase, now and then as "a picture of ..."; a sentence or "from ... to" stays as it is."""
        there = "there is" if count == 1 else "there are"
        frames = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "draw {}", there + " {}")
        frame = pick(self.rng, frames, (10, 1, 1, 1, 1, 1))
        return core if " is " in core or core.startswith("from ") else frame.format(core)

    def listed(self, things: tuple[Description, ...]) -> str:
        phrases = [self.placed(thing) for thing in things]
        if len(phrases) == 1:
            return phrases[0]
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    def placed(self, thing: Description) -> str:
        """A noun phrase with its place, or with the places of all that are alike."""
        if not thing.places:
            return self.noun_phrase(thing)
        places = [self.of(place) for place in thing.places]
        where = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
        return f"{self.noun_phrase(thing)} {where}"

    def related(self, claim: Claim) -> str:
        """Two things and the relation between them, or three in their order."""
        if len(claim.relations) == 2:
            first, second = claim.relations
            phrases = [self.noun_phrase(claim.things[i]) for i in (first.subject, first.other, second.other)]
            order = {
                "left of": "from left to right",
                "right of": "from right to left",
                "above": "from top to bottom",
                "below": "from bottom to top",
            }[first.name]
            joined = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
            return pick(self.rng, (f"{order}: {joined}", f"{joined} {order}", f"{order}, {joined}"))
        (relation,) = claim.relations
        a, b = self.placed(claim.things[relation.subject]), self.placed(claim.things[relation.other])
        name, inverse = self.of(relation.name), self.of(RELATIONS[relation.name])
        forms = [f"{a} {name} {b}", f"{a} {name} {b}", f"{a} is {name} {b}"]
        if relation.name == "around":
            forms = [f"{a} {name} {b}", f"{a} with {b} inside", f"{a} containing {b}", f"{a} with {b} in it"]
        elif relation.name != "inside":
            forms.append(f"{b} {inverse} {a}")
        return pick(self.rng, tuple(forms))

    def noun_phrase(self, thing: Description) -> str:
        """One thing with an article, or several with their number: "a small red striped circle"."""
        noun = self.of(thing.shape or "thing")
        size, colour = self.of(thing.size), self.of(thing.colour)
        before, after = self.of(thing.texture), ""
        if thing.texture == "striped" and pick(self.rng, (False, False, True)):
            before, after = "", " with stripes"
        parts = [size, *pick(self.rng, ((colour, before), (before, colour))), noun]
        phrase = " ".join(part for part in parts if part)
        if thing.count > 1:
            return f"{('two', 'three')[thing.count - 2]} {plural(phrase)}{after}"
        return f"{article(phrase)}{after}"

    def of(self, fact: str | None) -> str:
        """A word for a fact; none for a fact left open."""
        return "" if fact is None else pick(self.rng, ENGLISH[fact])


def article(phrase: str) -> str:
    """A phrase behind its indefinite article; no word of the vocabulary sounds other than it is spelt."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """A noun phrase in the plural."""
    if phrase.endswith("rhombus"):
        return phrase + "es"
    return phrase + ("es" if phrase.endswith("s") else "s")


@dataclass
class _Chinese:
    """Says claims in Chinese, drawing each word from a random stream."""

    rng: np.random.Generator

    def say(self, claim: Claim) -> str:
        """The whole claim: its things, their relations if it has any, and the background before or after."""
        core = self.related(claim) if claim.relations else self.listed(claim.things)
        bare = not claim.relations and not any(thing.places for thing in claim.things)
        framed = self.framed(core, bare)
        if claim.background is None:
            return framed
        ground = f"{self.of(claim.background)}{pick(self.rng, ('', '的'))}背景"
        forms = [f"{ground}，{core}", f"{framed}，{ground}", f"{core}，背景是{self.of(claim.background)}的"]
        if bare:
            forms += [f"{ground}上有{core}", f"{ground}上的{core}", f"在{ground}上画{core}"]
        return pick(self.rng, tuple(forms))

    def framed(self, core: str, bare: bool) -> str:
        """A bare phrase for the most part, now and then as a picture of something."""
        frames = ("{}", "一张图片：{}", "画{}" if bare else "{}", "图中有{}" if bare else "{}")
        return pick(self.rng, frames, (10, 1, 1, 1)).format(core)

    def listed(self, things: tuple[Description, ...]) -> str:
        if any(thing.places for thing in things):
            return pick(self.rng, ("，", "；")).join(self.placed(thing) for thing in things)
        phrases = [self.noun_phrase(thing) for thing in things]
        joint = pick(self.rng, ("和", "和", "与"))
        return "、".join(phrases[:-1]) + joint + phrases[-1] if len(phrases) > 1 else phrases[0]

    def placed(self, thing: Description) -> str:
        """A noun phrase with its place, or with the places of all that are alike."""
        phrase = self.noun_phrase(thing)
        if not thing.places:
            return phrase
        whole = pick(self.rng, ("", "", "画面", "图片"))
        where = "、".join(self.of(place) for place in thing.places)
        if thing.count > 1:
            return pick(self.rng, (f"{phrase}，分别在{whole}{where}", f"{whole}{where}各有一个，共{phrase}"))
        forms = (f"{whole}{where}有{phrase}", f"{phrase}在{whole}{where}", f"{phrase}位于{whole}{where}")
        return pick(self.rng, (*forms, f"{whole}{where}的{phrase}"))

    def related(self, claim: Claim) -> str:
        """Two things and the relation between them, or three in their order."""
        if len(claim.relations) == 2:
            first, second = claim.relations
            phrases = [self.noun_phrase(claim.things[i]) for i in (first.subject, first.other, second.other)]
            order = {"left of": "从左到右", "right of": "从右到左", "above": "从上到下", "below": "从下到上"}[
                first.name
            ]
            opening = pick(self.rng, ("{}依次是", "{}分别是", "{}：")).format(order)
            return f"{opening}{phrases[0]}、{phrases[1]}和{phrases[2]}"
        (relation,) = claim.relations
        first, other = claim.things[relation.subject], claim.things[relation.other]
        a, b, known = self.placed_before(first), self.noun_phrase(other), self.noun_phrase(other, known=True)
        if relation.name == "around":
            within = self.of("inside")
            return pick(self.rng, (f"{a}{within}有{b}", f"{a}{self.of('around')}{b}", f"{a}，{within}是{b}"))
        name, of = self.of(relation.name), pick(self.rng, ("的", "的", ""))
        if other.places:
            b = known = self.placed_before(other)
        return pick(
            self.rng,
            (
                f"{a}在{known}{of}{name}",
                f"{a}在{b}{of}{name}",
                f"{a}位于{known}{of}{name}",
                f"{known}{of}{name}有{a}",
                f"{b}{of}{name}是{a}",
            ),
        )

    def placed_before(self, thing: Description) -> str:
        """A noun phrase with its place in front of it, as part of a longer sentence."""
        return f"{self.of(thing.places[0])}的{self.noun_phrase(thing)}" if thing.places else self.noun_phrase(thing)

    def noun_phrase(self, thing: Description, known: bool = False) -> str:
        """A noun phrase with numeral and measure word, 一个红色的大圆形, or if `known` without them: 蓝色方块."""
        noun, colour, texture = self.of(thing.shape or "thing"), self.of(thing.colour), self.of(thing.texture)
        of = pick(self.rng, ("的", ""))
        size = self.of(thing.size)
        front = back = ""
        if thing.size in ("small", "large") and colour and pick(self.rng, (False, True)):
            back, of = CHINESE[thing.size][0], "的"
        elif size:
            front = f"{size}的" if len(size) > 1 or colour or texture else size
        colour = f"{colour}{of}" if colour else ""
        phrase = f"{front}{colour}{texture}{back}{noun}"
        if known:
            return phrase
        measure = pick(self.rng, ("个", "颗")) if thing.shape in ("star", "heart") else "个"
        return f"{'一两三'[thing.count - 1]}{measure}{phrase}"

    def of(self, fact: str | None) -> str:
        """A word for a fact; none for a fact left open."""
        return "" if fact is None else pick(self.rng, CHINESE[fact])
