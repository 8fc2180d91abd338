"""MiniPrompts and its report, on pictures that are known to be right or wrong."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from mini.pictures import scene_for
from PIL import Image

from kolors_ref.mini.claims import holds
from kolors_ref.mini.drawing import render
from kolors_ref.mini.evaluation import evaluate, write_report
from kolors_ref.mini.prompts import CATEGORIES, PER_CATEGORY, mini_prompts
from kolors_ref.mini.world import HELD_OUT_COLOURS, HELD_OUT_TEXTURES

PROMPTS = mini_prompts()
SCENES = {prompt.text: scene_for(prompt.claim) for prompt in PROMPTS}


def perfect(prompts):
    return [render(SCENES[prompt.text]) for prompt in prompts]


def blank(prompts):
    return [Image.new("RGB", (128, 128), "white") for _ in prompts]


@pytest.fixture(scope="module")
def report():
    return evaluate(perfect, PROMPTS)


def test_the_benchmark_stays_the_same():
    assert [prompt.number for prompt in PROMPTS] == list(range(len(PROMPTS)))
    digest = hashlib.sha256(repr([(p.text, p.language, p.category, p.claim) for p in PROMPTS]).encode()).hexdigest()
    assert digest[:16] == "a1e7ac856052fba4"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_benchmark_is_balanced(language):
    prompts = mini_prompts(language)
    assert len(prompts) >= 200
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, PER_CATEGORY)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert [p.claim for p in prompts] == [p.claim for p in PROMPTS[::2]]
    assert len({(p.category, p.claim) for p in prompts}) == len(prompts)


def test_only_one_category_asks_for_what_is_held_out():
    for prompt in PROMPTS:
        held_out = any(
            (thing.shape, thing.colour) in HELD_OUT_COLOURS or (thing.shape, thing.texture) in HELD_OUT_TEXTURES
            for thing in prompt.claim.things
        )
        assert held_out == (prompt.category == "held-out"), prompt.text


def test_every_claim_can_be_met():
    for prompt in PROMPTS:
        assert holds(prompt.claim, SCENES[prompt.text]), prompt.text


def test_right_pictures_score_one_hundred(report):
    assert [result.prompt.text for result in report.results if not result.verdict] == []
    assert report.score() == 1.0


def test_blank_pictures_score_nothing():
    assert evaluate(blank, PROMPTS[::9]).score() == 0.0


def test_scores_by_category_and_language():
    """Chinese pictures of one category are spoilt: its score and the totals say so, and no other."""
    spoilt = {p.text for p in PROMPTS if (p.category, p.language) == ("colour", "zh")}

    def draw(prompts):
        return [Image.new("RGB", (128, 128)) if p.text in spoilt else render(SCENES[p.text]) for p in prompts]

    report = evaluate(draw, [p for p in PROMPTS if p.category in ("colour", "shape")], batch_size=7)
    assert (report.score("colour", "zh"), report.score("colour", "en"), report.score("colour")) == (0.0, 1.0, 0.5)
    assert (report.score("shape"), report.score(language="zh"), report.score()) == (1.0, 0.5, 0.75)
    assert report.table().splitlines() == [
        "category       prompts      zh      en     all",
        "colour              48     0.0   100.0    50.0",
        "shape               48   100.0   100.0   100.0",
        "all                 96    50.0   100.0    75.0",
    ]


def test_batches_are_as_large_as_asked():
    sizes = []

    def draw(prompts):
        sizes.append(len(prompts))
        return blank(prompts)

    evaluate(draw, PROMPTS[:10], batch_size=4)
    assert sizes == [4, 4, 2]


def test_a_wrong_number_of_pictures_is_refused():
    with pytest.raises(ValueError, match="draw gave 1 pictures of 4 prompts"):
        evaluate(lambda prompts: blank(prompts[:1]), PROMPTS[:4])


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="the language is 'fr'; MiniPrompts are in zh and en"):
        mini_prompts("fr")


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts to evaluate"):
        evaluate(perfect, [])


def test_json_and_contact_sheet(report, tmp_path):
    write_report(tmp_path / "report.json", report.as_dict())
    report.write_contact_sheet(tmp_path / "sheet.png")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf8"))
    assert written["scores"]["relation"] == {"zh": 1.0, "en": 1.0, "all": 1.0}
    assert len(written["results"]) == len(PROMPTS)
    assert written["results"][0]["prompt"] == PROMPTS[0].text
    assert written["results"][0]["reading"]["things"][0]["shape"] == "circle"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 104 * 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "sheet.png"]


def test_a_report_on_a_full_disk(report, tmp_path, monkeypatch):
    """The file is named, an older one stays, and nothing is left beside it."""
    for name in ("report.json", "sheet.png"):
        (tmp_path / name).write_text("an older one")

    def half(path, *arguments, **options):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    monkeypatch.setattr(Image.Image, "save", lambda image, path, **options: half(path))
    with pytest.raises(OSError, match=r"report\.json cannot be written: No space left on device"):
        write_report(tmp_path / "report.json", report.as_dict())
    with pytest.raises(OSError, match=r"sheet\.png cannot be written: No space left on device"):
        report.write_contact_sheet(tmp_path / "sheet.png")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("report.json", "sheet.png"), "an older one"
    )
