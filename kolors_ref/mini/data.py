"""The training data of the miniature Kolors: unlimited, drawn when it is asked for, the same on every machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from PIL import Image

from .captions import LANGUAGES, word
from .claims import Claim, choose_claim
from .drawing import render
from .scenes import generator, pick, sample_scene
from .world import Scene

DENSE_SHARE = 0.5
"""The share of dense captions among those of examples; stages that word scenes anew have shares of their own."""


@dataclass(frozen=True)
class Example:
    """A scene with one caption of it, and the claim that the caption makes."""

    scene: Scene
    claim: Claim
    caption: str
    language: str
    dense: bool

    @property
    def image(self) -> Image.Image:
        """The picture: RGB, 128 x 128 pixels, drawn anew each time."""
        return render(self.scene)


def example(seed: int, index: int, held_out: bool = False, clean: bool = False) -> Example:
    """Draws example number `index` of a seed.

    With `held_out`, its first thing has a combination of attributes that training must never show. With `clean`, it is
    of the subset for quality tuning: upright, in exact sizes and colours, in line and well apart.
    """
    rng = generator(seed, index)
    scene = sample_scene(rng, held_out, clean)
    dense = rng.random() < DENSE_SHARE
    language = pick(rng, LANGUAGES)
    claim = choose_claim(scene, rng, dense)
    return Example(scene, claim, word(claim, rng, language), language, dense)


def examples(seed: int) -> Iterator[Example]:
    """Draws the training examples of a seed, without end."""
    return (example(seed, index) for index in count())
