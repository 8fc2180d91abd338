"""Which of two captions belongs to a picture: what a UNet has understood of text, long before its pictures show it.

The caption with which it predicts the noise in the picture better is its choice (Li et al. 2023, "Your Diffusion Model
is Secretly a Zero-Shot Classifier", section 3). The other caption is the same but for one fact, so one half is chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, product
from typing import Any

import numpy as np
import torch

from ..images import to_pixels
from ..pipeline import KolorsPipeline
from ..sampling.schedule import vp_level
from ..text_layout import packed_layout
from .autoencoder import unit_noise
from .captions import LANGUAGES, word
from .claims import Claim, choose_claim, holds
from .denoiser import EVEN_VARIANCE, size_conditions
from .drawing import render
from .scenes import generator, pick, sample_scene
from .world import BACKGROUNDS, CANVAS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Scene

SEED = 3000
"""The seed of the pictures; no stage of training with the default seed sees them."""
NOISE_LEVELS = (1.5, 3.0, 6.0)
"""Noise of a picture, relative to its latents: where it is decided what stands where."""
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "texture": TEXTURES}
FACTS = (*ATTRIBUTES, "place", "background", "direction", "nesting", "binding", "count")
"""What one of the two captions tells wrong; direction and nesting are relations, and binding is which of two things has
which colour."""
COLUMNS = {
    "short": {"dense": False},
    "dense": {"dense": True},
    "zh": {"language": "zh"},
    "en": {"language": "en"},
    "all": {},
}
"""The columns of a table of scores."""


@dataclass(frozen=True)
class Choice:
    """Choice number `number`, about one fact: a scene, a caption of it, and the same with that fact wrong."""

    number: int
    fact: str
    dense: bool
    language: str
    scene: Scene
    right: str
    wrong: str


def choices(per_fact: int) -> list[Choice]:
    """The first `per_fact` choices for every fact, caption length and language: always the same ones.

    A dense caption states places, and so no direction. A choice's number, which seeds its noise, depends on per_fact.
    """
    found = []
    for fact, dense in product(FACTS, (False, True)):
        if dense and fact == "direction":
            continue
        for number, scene, claim, other in islice(scenes_that_tell(fact, dense), per_fact):
            for language in LANGUAGES:
                right, wrong = (word(told, generator(SEED + 2, number), language) for told in (claim, other))
                found.append(Choice(len(found), fact, dense, language, scene, right, wrong))
    return found


def scenes_that_tell(fact: str, dense: bool) -> Iterator[tuple[int, Scene, Claim, Claim]]:
    """Goes through the scenes of which a caption tells a fact: its number, the scene, its claim, and a wrong one."""
    for number in count():
        scene, rng = sample_scene(generator(SEED, number)), generator(SEED + 1, number)
        claim = choose_claim(scene, rng, dense)
        other = changed(claim, fact, rng)
        if other is not None and not holds(other, scene):
            yield number, scene, claim, other


def changed(claim: Claim, fact: str, rng: np.random.Generator) -> Claim | None:
    """The claim with one fact changed; None if it does not state that fact. The result may still be true of a scene."""
    first, *rest = claim.things
    if fact in ATTRIBUTES:
        told = getattr(first, fact)
        others = [value for value in ATTRIBUTES[fact] if value != told]
        return None if told is None else replace(claim, things=(replace(first, **{fact: pick(rng, others)}), *rest))
    if fact == "place" and len(first.places) == 1:
        others = [place for place in PLACES if place != first.places[0]]
        return replace(claim, things=(replace(first, places=(pick(rng, others),)), *rest))
    if fact == "background" and claim.background is not None:
        return replace(claim, background=pick(rng, [name for name in BACKGROUNDS if name != claim.background]))
    nested = any(relation.name in ("inside", "around") for relation in claim.relations)
    if claim.relations and fact == ("nesting" if nested else "direction"):
        turned = tuple(replace(relation, name=RELATIONS[relation.name]) for relation in claim.relations)
        return replace(claim, relations=turned)
    if fact == "binding" and len(claim.things) == 2 and None not in (first.colour, rest[0].colour):
        return replace(claim, things=(replace(first, colour=rest[0].colour), replace(rest[0], colour=first.colour)))
    if fact == "count" and first.count > 1:
        others = [place for place in PLACES if place not in first.places]
        places = first.places and (*first.places, pick(rng, others))[: 5 - first.count]
        return replace(claim, things=(replace(first, count=5 - first.count, places=places), *rest))
    return None


@dataclass(frozen=True)
class Chosen:
    """A choice, and whether the right caption was taken."""

    choice: Choice
    right: bool


@dataclass(frozen=True)
class CaptionReport:
    """What was chosen, in the order of the choices."""

    results: tuple[Chosen, ...]

    def scores(self) -> dict[str, dict[str, float]]:
        """The shares of right choices, in [0, 1], by fact and by column of `COLUMNS`; empty ones are left out."""
        shares: dict[str, dict[str, float]] = {}
        for fact, (name, asked) in product((*FACTS, "all"), COLUMNS.items()):
            taken = [
                result.right
                for result in self.results
                if fact in ("all", result.choice.fact)
                and all(getattr(result.choice, field) == value for field, value in asked.items())
            ]
            if taken:
                shares.setdefault(fact, {})[name] = sum(taken) / len(taken)
        return shares

    def table(self) -> str:
        """The scores in percent as text to be printed: facts down; lengths of captions and languages across."""
        lines = [f"{'fact':<14}" + "".join(f"{name:>8}" for name in COLUMNS)]
        for fact, shares in self.scores().items():
            cells = (f"{100 * shares[name]:.1f}" if name in shares else "-" for name in COLUMNS)
            lines.append(f"{fact:<14}" + "".join(f"{cell:>8}" for cell in cells))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Scores and single results, for JSON."""
        told = ("fact", "dense", "language", "right", "wrong")
        results = [
            {**{name: getattr(result.choice, name) for name in told}, "chosen": "right" if result.right else "wrong"}
            for result in self.results
        ]
        return {"scores": self.scores(), "results": results}


@torch.no_grad()
def choose(pipe: KolorsPipeline, offered: Sequence[Choice]) -> list[Chosen]:
    """Has a pipeline's UNet choose between captions, which see the same noise."""
    device, dtype = pipe.device, pipe.dtype
    pixels = to_pixels([render(choice.scene) for choice in offered])
    latents = pipe.vae.encode(pixels.to(device, pipe.vae.quant_conv.weight.dtype)).mode().float()
    captions = [caption for choice in offered for caption in (choice.right, choice.wrong)]
    text = packed_layout(pipe.tokenizer(captions)).encode(pipe.text_encoder)
    sizes = size_conditions(torch.full((len(captions),), float(CANVAS))).to(device, dtype)
    context = pipe.unet.prepare(text.sequence, text.pooled, sizes, text.key_bias)
    noise = torch.stack([unit_noise(SEED, choice.number, tuple(latents.shape[1:])) for choice in offered]).to(device)
    error = torch.zeros(len(captions), device=device)
    for sigma in NOISE_LEVELS:
        timestep = (pipe.schedule.sigmas - sigma).abs().argmin().to(device).expand(len(captions))
        noisy = vp_level(sigma).mix(latents, noise).repeat_interleave(2, 0)
        noise_pred = pipe.unet(noisy.to(dtype), timestep, context).float()
        squared = (noise_pred - noise.repeat_interleave(2, 0)).square().mean((1, 2, 3))
        error += (EVEN_VARIANCE + sigma**2) * squared
    right, wrong = error.view(-1, 2).unbind(1)
    return [Chosen(choice, taken) for choice, taken in zip(offered, (right < wrong).tolist(), strict=True)]
