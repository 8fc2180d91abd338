"""`kolors-ref train mini` and `kolors-ref evaluate`: what they accept, refuse and write."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from kolors_ref import cli
from kolors_ref.mini import commands
from kolors_ref.mini.recipe import Recipe


def run(capsys, *arguments):
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_the_ablations_offered_are_those_there_are():
    assert set(cli.ABLATIONS) == set(commands.ABLATIONS)


@pytest.mark.parametrize("name", commands.ABLATIONS)
def test_an_ablation_changes_the_unet_alone_or_the_words(name):
    """The autoencoder of all runs is the same, so that runs can be compared."""
    plain, ablated = asdict(Recipe()), asdict(commands.ABLATIONS[name](Recipe()))
    changed = {field for field in plain if plain[field] != ablated[field]}
    assert changed
    assert changed <= {"bag_of_words", "dense_share", "schedule", "unet", "unet_tuning"}


def test_without_tuning_the_steps_are_as_many():
    ablated = commands.ABLATIONS["no-tuning"](Recipe())
    assert ablated.unet.steps == Recipe().unet.steps + Recipe().unet_tuning.steps
    assert [stage.name for stage in ablated.stages] == ["glm", "vae", "vae-whole", "unet"]


def test_training_runs_what_was_asked_for(capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(commands, "train_mini", lambda *arguments: calls.append(arguments) or "MODEL")
    arguments = ("--folder", tmp_path, "--scale", "0.1", "--seed", "3", "--ablate", "sdxl-schedule", "--previous")
    assert run(capsys, "train", "mini", *arguments)[:2] == (0, "MODEL\n")
    [(folder, recipe, here, previous)] = calls
    assert (folder, previous, here.count) == (tmp_path, True, 1)
    assert (recipe.seed, recipe.schedule.beta_end) == (3, 0.012)
    assert recipe.glm.steps == round(0.1 * Recipe().glm.steps)


def test_evaluation_prints_and_writes(capsys, small_checkpoint, tmp_path):
    arguments = ("--model", small_checkpoint, "--limit", "1", "--steps", "1", "--language", "zh", "--batch-size", "5")
    status, out, _ = run(capsys, "evaluate", *arguments, "--sampler", "euler", "-o", tmp_path / "scores")
    assert status == 0
    assert out.splitlines()[0].split() == ["category", "prompts", "zh", "all"]
    report = json.loads((tmp_path / "scores" / "report.json").read_text(encoding="utf8"))
    assert len(report["results"]) == 10
    assert Image.open(tmp_path / "scores" / "sheet.png").size[1] == 104 * 10


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["train"], "required: what"),
        (["train", "maxi"], "'maxi'"),
        (["train", "mini", "--scale", "0"], "0 is not above 0"),
        (["train", "mini", "--scale", "many"], "many"),
        (["train", "mini", "--ablate", "everything"], "'everything'"),
        (["train", "mini", "--device", "abacus"], "'abacus'"),
        (["evaluate", "--limit", "0"], "0 is not at least 1"),
        (["evaluate", "--language", "fr"], "'fr'"),
        (["evaluate", "--model", "no-such-folder"], "no-such-folder"),
        (["evaluate", "-o", "no/such/folder"], "no/such"),
        (["evaluate", "--device", "abacus"], "'abacus'"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, mentions):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("kolors-ref: error: ")
    assert err.count("\n") == 1
    assert mentions in err
    assert list(tmp_path.iterdir()) == []
