"""Claims and their wording: nothing false, nothing missing, and the prompts that people type are among them."""

import re
from dataclasses import replace

import pytest

from kolors_ref.mini.captions import LANGUAGES, article, plural, word
from kolors_ref.mini.claims import Claim, Description, Relation, holds, shuffled
from kolors_ref.mini.data import example
from kolors_ref.mini.scenes import generator
from kolors_ref.mini.vocabulary import CHINESE, ENGLISH
from kolors_ref.mini.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, Thing

EXAMPLES = [example(0, index) for index in range(1500)]
RED_LEFT_OF_BLUE = Claim(
    (Description("circle", "red"), Description("square", "blue")),
    (Relation(0, "left of", 1),),
)


def wordings(claim, language, count=3000):
    return {word(claim, generator(1, index), language) for index in range(count)}


def facts(claim):
    """Everything that a claim says, by name."""
    for thing in claim.things:
        yield from (fact for fact in (thing.shape, thing.colour, thing.size, thing.texture, *thing.places) if fact)
    if claim.background:
        yield claim.background


def test_every_claim_holds_for_its_scene():
    assert all(holds(example.claim, example.scene) for example in EXAMPLES)


def test_every_fact_is_said():
    for one in EXAMPLES:
        vocabulary = CHINESE if one.language == "zh" else ENGLISH
        for fact in facts(one.claim):
            said = [*vocabulary[fact], "with stripes"] if fact == "striped" else vocabulary[fact]
            assert any(w in one.caption for w in said), (fact, one.caption)


def test_nothing_else_is_said():
    """A colour, size or texture that no fact names must not be in a caption; black on black is one word twice."""
    for one in EXAMPLES:
        vocabulary = CHINESE if one.language == "zh" else ENGLISH
        said = set(facts(one.claim))
        allowed = {w for fact in said for w in vocabulary[fact]}
        rest = one.caption
        for w in sorted(allowed, key=len, reverse=True):
            rest = rest.replace(w, "~")
        for fact in (*COLOURS, *TEXTURES, *BACKGROUNDS, "small", "medium", "large"):
            for w in vocabulary[fact]:
                pattern = rf"\b{w}\b" if one.language == "en" else w
                assert fact in said or not re.search(pattern, rest), (fact, one.caption)


def test_a_shuffled_claim_says_the_same_in_any_order():
    """The relations too, whose subjects and others move with their things."""
    orders = set()
    for number, one in enumerate(EXAMPLES):
        claim = shuffled(one.claim, generator(5, number))
        assert holds(claim, one.scene)
        facts = lambda claim: {(claim.things[r.subject], r.name, claim.things[r.other]) for r in claim.relations}
        assert (facts(claim), claim.background) == (facts(one.claim), one.claim.background)
        assert sorted(map(repr, claim.things)) == sorted(map(repr, one.claim.things))
        if len(set(claim.things)) == 3:
            orders.add(tuple(map(claim.things.index, one.claim.things)))
    assert len(orders) == 6


def test_dense_claims_say_everything():
    for one in (one for one in EXAMPLES if one.dense):
        assert one.claim.background == one.scene.background
        inside = {relation.subject for relation in one.claim.relations}
        for i, thing in enumerate(one.claim.things):
            assert None not in (thing.shape, thing.colour, thing.size, thing.texture)
            assert len(thing.places) == thing.count or i in inside
        assert sum(thing.count for thing in one.claim.things) == len(one.scene.things)


def test_short_claims_leave_facts_open():
    short = [one.claim for one in EXAMPLES if not one.dense]
    assert 0.4 < len(short) / len(EXAMPLES) < 0.6
    assert 0.2 < sum(claim.background is not None for claim in short) / len(short) < 0.4
    assert sum(any(thing.size is None for thing in claim.things) for claim in short) > len(short) / 3


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_are_of_their_language(language):
    for one in (one for one in EXAMPLES if one.language == language):
        chinese = re.findall("[\u4e00-\u9fff]", one.caption)
        latin = re.findall("[A-Za-z]", one.caption)
        assert not (chinese if language == "en" else latin)
        assert not re.search(r"\s\s|^\s|\s$|的的|\b(a|an) (a|an)\b|None", one.caption)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", one.caption)


def test_half_of_the_captions_are_chinese():
    assert 0.45 < sum(one.language == "zh" for one in EXAMPLES) / len(EXAMPLES) < 0.55


@pytest.mark.parametrize(
    ("language", "prompt"),
    [
        ("zh", "一个红色的圆形在蓝色方块的左边"),
        ("zh", "蓝色方块的左边有一个红色的圆形"),
        ("en", "a red circle to the left of a blue square"),
        ("en", "a blue square to the right of a red circle"),
        ("en", "a red circle is left of a blue square"),
    ],
)
def test_prompts_that_people_type(language, prompt):
    assert prompt in wordings(RED_LEFT_OF_BLUE, language, 10000)


@pytest.mark.parametrize("language", LANGUAGES)
def test_many_phrasings(language):
    assert len(wordings(RED_LEFT_OF_BLUE, language)) > 250
    assert len(wordings(Claim((Description("star", "yellow", "large", places=("top left",)),)), language)) > 100


def test_other_languages_are_refused():
    with pytest.raises(ValueError, match="'zh' and 'en', not 'fr'"):
        word(RED_LEFT_OF_BLUE, generator(0, 0), "fr")


@pytest.mark.parametrize("vocabulary", [ENGLISH, CHINESE])
def test_every_fact_has_words(vocabulary):
    for names in (SHAPES, COLOURS, BACKGROUNDS, SIZES, TEXTURES, PLACES, RELATIONS):
        assert all(vocabulary[name] for name in names)


@pytest.mark.parametrize("vocabulary", [ENGLISH, CHINESE])
def test_no_word_means_two_things(vocabulary):
    for names in (SHAPES, {**COLOURS, **BACKGROUNDS}, SIZES, TEXTURES, PLACES):
        words = [w for name in names for w in set(vocabulary[name])]
        assert len(words) == len(set(words))


def test_english_articles_and_plurals():
    assert (article("orange star"), article("red star")) == ("an orange star", "a red star")
    assert [plural(w) for w in ("star", "cross", "rhombus")] == ["stars", "crosses", "rhombuses"]


# --- What a claim demands ---

A = Thing("circle", "red", "small", "filled", 30, 64, 24)
B = Thing("square", "blue", "large", "outline", 90, 60, 58)


@pytest.mark.parametrize(
    ("claim", "true"),
    [
        (RED_LEFT_OF_BLUE, True),
        (replace(RED_LEFT_OF_BLUE, relations=(Relation(1, "left of", 0),)), False),
        (replace(RED_LEFT_OF_BLUE, relations=(Relation(1, "right of", 0),)), True),
        (replace(RED_LEFT_OF_BLUE, relations=(Relation(0, "above", 1),)), False),
        (replace(RED_LEFT_OF_BLUE, background="white"), True),
        (replace(RED_LEFT_OF_BLUE, background="black"), False),
        (Claim((Description("circle", "red"),)), False),
        (Claim((Description("circle", "blue"), Description("square", "red"))), False),
        (Claim((Description(size="large"), Description(texture="filled"))), True),
        (Claim((Description(size="large"), Description(size="large"))), False),
        (Claim((Description(count=2),)), True),
        (Claim((Description(count=3),)), False),
        (Claim((Description(count=2, places=("right", "left")),)), True),
        (Claim((Description(count=2, places=("left", "left")),)), False),
        (Claim((Description("square", places=("left",)), Description("circle"))), False),
    ],
)
def test_what_a_claim_demands(claim, true):
    assert holds(claim, Scene("white", (A, B))) == true
    assert holds(claim, Scene("white", (B, A))) == true
