"""Choosing between captions: the pairs that are offered, and who takes the right ones."""

import re
from itertools import islice

import pytest
import torch
from torch import nn

from kolors_ref import KolorsPipeline
from kolors_ref.mini.caption_choice import FACTS, CaptionReport, Chosen, choices, choose, scenes_that_tell
from kolors_ref.mini.captions import LANGUAGES
from kolors_ref.mini.claims import holds
from kolors_ref.mini.drawing import render
from kolors_ref.mini.judge import judge

OFFERED = choices(4)


def test_every_fact_is_asked_for_alike():
    asked = [(choice.fact, choice.dense, choice.language) for choice in OFFERED]
    every = {(fact, dense, language) for fact in FACTS for dense in (False, True) for language in LANGUAGES}
    assert set(asked) == {one for one in every if one[:2] != ("direction", True)}
    assert all(asked.count(one) == 4 for one in set(asked))
    assert [choice.number for choice in OFFERED] == list(range(len(OFFERED)))
    assert choices(4) == OFFERED


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("dense", [False, True])
def test_one_caption_is_true_and_the_other_is_not(fact, dense):
    if dense and fact == "direction":
        pytest.skip("a dense caption tells places instead")
    for _, scene, claim, other in islice(scenes_that_tell(fact, dense), 12):
        picture = render(scene)
        for told, is_true in ((claim, True), (other, False)):
            assert holds(told, scene) == is_true
            assert judge(picture, told).holds == is_true


def test_of_two_bindings_the_words_are_the_same():
    """Who counts words cannot tell whose colour is whose."""
    for choice in OFFERED:
        if choice.fact == "binding" and choice.language == "en":
            words = [
                re.findall(r"[\w-]+", caption.replace("violet", "purple")) for caption in (choice.right, choice.wrong)
            ]
            right, wrong = ([word for word in caption if word not in ("a", "an")] for caption in words)
            assert right != wrong
            assert sorted(right) == sorted(wrong)


@pytest.fixture(scope="module")
def mini():
    return KolorsPipeline.from_pretrained("mini", torch.float32)


def test_the_miniature_takes_the_right_one(mini):
    report = CaptionReport(tuple(choose(mini, OFFERED)))
    scores = report.scores()
    assert scores["all"]["all"] > 0.9
    assert all(scores[fact]["all"] > 0.6 for fact in FACTS)


def test_who_does_not_hear_the_text_cannot_tell(mini, monkeypatch):
    """With text that says nothing both errors are the same, so that the right one is never the smaller."""

    class Deaf(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.config, self.conv_in = unet, unet.config, unet.conv_in

        def prepare(self, text, pooled, sizes, key_bias):
            return self.unet.prepare(torch.zeros_like(text), torch.zeros_like(pooled), sizes, None)

        def forward(self, *arguments):
            return self.unet(*arguments)

    monkeypatch.setattr(mini, "unet", Deaf(mini.unet))
    assert sum(chosen.right for chosen in choose(mini, OFFERED[:16])) == 0


def test_scores_are_shares_of_what_was_chosen():
    results = tuple(Chosen(choice, choice.language == "zh" and choice.fact != "size") for choice in OFFERED)
    scores = CaptionReport(results).scores()
    assert scores["colour"] == {"short": 0.5, "dense": 0.5, "zh": 1.0, "en": 0.0, "all": 0.5}
    assert scores["size"]["all"] == 0.0
    assert scores["direction"] == {"short": 0.5, "zh": 1.0, "en": 0.0, "all": 0.5}
    assert scores["all"]["zh"] == pytest.approx(1 - 8 / 76)
    table = CaptionReport(results).table().splitlines()
    assert table[0].split() == ["fact", "short", "dense", "zh", "en", "all"]
    assert table[7].split() == ["direction", "50.0", "-", "100.0", "0.0", "50.0"]
    assert len(CaptionReport(results).as_dict()["results"]) == len(OFFERED)
