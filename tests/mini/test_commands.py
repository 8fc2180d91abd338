"""`kolors-ref train mini` and `kolors-ref evaluate`: what they accept, refuse and write."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from kolors_ref import KolorsPipeline, cli
from kolors_ref.mini import commands
from kolors_ref.mini.processes import Processes
from kolors_ref.mini.prompts import mini_prompts
from kolors_ref.mini.recipe import Recipe
from kolors_ref.mini.reuse import reuse_stages
from kolors_ref.mini.reward_tuning import UPDATES
from kolors_ref.mini.train import Run, train_mini

UNFINISHED = "unet-00000200.safetensors"
LATENTS = ("latents-0000000.safetensors", "latents-0002048.safetensors", "latents-clean-0000000.safetensors")
UNETS = ("unet", "unet-tuning", "unet-reward", "unet-reward-again")
REWARDS = ("unet_reward", "unet_reward_again")
DENOISED = ("unet.safetensors", "unet-tuning.safetensors")
REST = ("vae-whole.safetensors", "vae-scale.json", "vae-decoder.safetensors", *LATENTS, *DENOISED)

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kolors_ref.cli")


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
    assert changed <= {"bag_of_words", "dense_share", "schedule", "unet_tuning", *REWARDS}


@pytest.mark.parametrize(("name", "stages"), [("no-tuning", ("unet_tuning",)), ("no-reward", REWARDS)])
def test_without_a_tuning_the_rest_is_as_it_was(name, stages):
    ablated = commands.ABLATIONS[name](Recipe())
    assert all(getattr(ablated, stage).steps == 0 for stage in stages)
    assert replace(ablated, **{stage: getattr(Recipe(), stage) for stage in stages}) == Recipe()


def a_run(folder, recipe):
    """A folder as a run leaves it, but for the contents of its files."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    for name in ("tokenizer.model", "glm.safetensors", "vae.safetensors", "vae-whole.safetensors", "vae-scale.json"):
        (folder / name).write_text(name)
    for name in ("vae-decoder", "latents-0000000", "latents-0002048", "latents-clean-0000000", *UNETS, "unet-00000200"):
        (folder / f"{name}.safetensors").write_text(name)
    return folder


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"unet_reward": replace(Recipe().unet_reward, steps=0)}, set()),
        ({"unet_tuning": replace(Recipe().unet_tuning, steps=0)}, {"unet-tuning.safetensors"}),
        ({"dense_share": 0.0}, set(DENOISED)),
        ({"bag_of_words": True}, {"glm.safetensors", *DENOISED}),
        ({"scenes": 64}, {"latents-0000000.safetensors", "latents-0002048.safetensors", *DENOISED}),
        ({"vae_whole": replace(Recipe().vae_whole, steps=7)}, set(REST)),
        ({"vae_decoder": replace(Recipe().vae_decoder, steps=7)}, {"vae-decoder.safetensors"}),
    ],
)
def test_stages_that_are_the_same_are_taken_over(tmp_path, change, missing):
    other, folder = a_run(tmp_path / "other", Recipe()), tmp_path / "ours"
    ours = replace(Recipe(), **change)
    copied = reuse_stages(folder, str(other), ours)
    rewarded = {f"{name}.safetensors" for name in UNETS[2:]}
    everything = {path.name for path in other.iterdir()} - {"recipe.json", UNFINISHED, *rewarded}
    assert {path.name for path in folder.iterdir()} == {"recipe.json", *copied}
    assert set(copied) == everything - missing
    assert json.loads((folder / "recipe.json").read_text()) == ours.record()
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in copied)


def test_nothing_is_taken_over_twice_or_from_nowhere(tmp_path):
    other, folder = a_run(tmp_path / "other", Recipe()), tmp_path / "ours"
    assert reuse_stages(folder, str(other), Recipe())
    (folder / "vae.safetensors").write_text("our own")
    assert reuse_stages(folder, str(other), Recipe()) == []
    assert (folder / "vae.safetensors").read_text() == "our own"
    with pytest.raises(FileNotFoundError, match="no training run"):
        reuse_stages(folder, str(tmp_path), Recipe())


def test_nothing_is_taken_over_into_a_run_of_another_recipe(tmp_path):
    other, folder = a_run(tmp_path / "other", replace(Recipe(), seed=1)), tmp_path / "ours"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(asdict(Recipe())))
    with pytest.raises(ValueError, match="ours holds a run of another recipe"):
        reuse_stages(folder, str(other), replace(Recipe(), seed=1))
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_the_embedded_miniature_gives_all_but_its_unet(tmp_path):
    taken = reuse_stages(tmp_path, "mini", replace(Recipe(), dense_share=0.0))
    stages = ("glm", "vae", "vae-whole", "vae-decoder")
    assert set(taken) == {"tokenizer.model", "vae-scale.json", *(f"{stage}.safetensors" for stage in stages)}
    run = Run(tmp_path, replace(Recipe(), dense_share=0.0), Processes(0, 1, torch.device("cpu")), False)
    embedded = KolorsPipeline.from_pretrained("mini", torch.float32)
    assert run.tokenizer().encode("一个红色的圆形") == embedded.tokenizer.encode("一个红色的圆形")
    vae = run.autoencoder()
    assert vae.config == embedded.vae.config
    for ours, theirs in ((run.language_model().encoder, embedded.text_encoder), (vae, embedded.vae)):
        weights, expected = ours.state_dict(), theirs.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_without_a_stage_in_common_is_refused(tmp_path):
    """It would train everything anew, for hours, as if nothing had been asked for."""
    other = a_run(tmp_path / "other", Recipe())
    for name, message in ((str(other), f"no stage of {other} is"), ("mini", "no stage of the embedded miniature is")):
        for recipe in (replace(Recipe(), seed=1), Recipe().scaled(0.01)):
            with pytest.raises(ValueError, match=message):
                reuse_stages(tmp_path / "ours", name, recipe)
    assert not (tmp_path / "ours").exists()


def test_a_taking_over_that_was_cut_short_binds_the_recipe(tmp_path, monkeypatch):
    """Else another recipe would go on with files that are not its own."""
    other, folder = a_run(tmp_path / "other", Recipe()), tmp_path / "ours"

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reuse_stages(folder, str(other), Recipe())
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train_mini(folder, replace(Recipe(), seed=1), Processes(0, 1, torch.device("cpu")))


def test_a_folder_may_be_called_mini(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\./mini holds no training run"):
        reuse_stages(tmp_path / "ours", "./mini", Recipe())
    a_run(tmp_path / "mini", replace(Recipe(), seed=1))
    assert reuse_stages(tmp_path / "ours", "./mini", replace(Recipe(), seed=1))


@pytest.mark.parametrize(
    "arguments", [("train", "mini", "--folder"), ("evaluate", "-o")], ids=lambda arguments: arguments[0]
)
def test_a_file_in_the_place_of_a_folder_is_left_alone(capsys, tmp_path, arguments):
    (tmp_path / "file").write_text("mine")
    status, out, err = run(capsys, *arguments, tmp_path / "file")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "is a file; give" in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write into")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(capsys):
    status, out, err = run(capsys, "evaluate", "-o", "/proc/scores")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "/proc/scores of the output cannot be written" in err


def test_training_runs_what_was_asked_for(capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(commands, "train_mini", lambda *arguments: calls.append(arguments) or "MODEL")
    arguments = ("--folder", tmp_path, "--scale", "0.1", "--seed", "3", "--previous")
    arguments += ("--ablate", "sdxl-schedule", "--ablate", "no-reward")  # one on the other
    assert run(capsys, "train", "mini", *arguments)[:2] == (0, "MODEL\n")
    [(folder, recipe, here, previous)] = calls
    assert (folder, previous, here.count) == (tmp_path, True, 1)
    assert (recipe.seed, recipe.schedule.beta_end) == (3, 0.012)
    assert recipe.glm.steps == round(0.1 * Recipe().glm.steps)
    assert [getattr(recipe, stage).steps for stage in ("unet_tuning", *REWARDS)] == [750, 0, 0]


def test_the_unets_steps_can_be_chosen(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "train_mini", lambda *arguments: calls.append(arguments))
    assert run(capsys, "train", "mini", "--unet-steps", "1000")[0] == 0
    recipe = calls[0][1]
    stages = ("unet", "unet_tuning", *REWARDS)
    assert [getattr(recipe, stage).steps for stage in stages] == [1000, 1071, 403, 86]
    assert recipe == replace(Recipe(), **{stage: getattr(recipe, stage) for stage in stages})


@pytest.mark.parametrize(("scale", "steps"), [(1.0, 7000), (0.01, 1000), (0.005, 500), (1.0, 50)])
def test_no_checkpoint_is_taken_within_a_round_of_rewards(capsys, monkeypatch, scale, steps):
    """There the pictures of the round are not known any more."""
    recipes = []
    monkeypatch.setattr(commands, "train_mini", lambda folder, recipe, *rest: recipes.append(recipe))
    assert run(capsys, "train", "mini", "--scale", scale, "--unet-steps", steps)[0] == 0
    for stage in REWARDS:
        assert getattr(recipes[0], stage).save_every % UPDATES == 0


def test_few_steps_reach_the_full_learning_rate():
    for steps in (1, 50, 1000):
        stage = Recipe().with_unet_steps(steps).unet
        assert max(stage.rate_factor(step) for step in range(steps)) > 0.8


def test_evaluation_prints_and_writes(capsys, small_checkpoint, tmp_path):
    arguments = ("--model", small_checkpoint, "--limit", "1", "--steps", "1", "--language", "zh", "--device", "cpu")
    status, out, _ = run(capsys, "evaluate", *arguments, "--sampler", "euler", "-o", tmp_path / "scores")
    assert status == 0
    assert out.splitlines()[0].split() == ["category", "prompts", "zh", "all"]
    report = json.loads((tmp_path / "scores" / "report.json").read_text(encoding="utf8"))
    assert len(report["results"]) == 10
    assert Image.open(tmp_path / "scores" / "sheet.png").size[1] == 104 * 10


def test_evaluation_draws_as_it_was_asked_to(capsys, monkeypatch, tmp_path):
    calls = []

    class Pipe:
        def __call__(self, prompts, **options):
            calls.append({**options, "generator": [generator.initial_seed() for generator in options["generator"]]})
            return [Image.new("RGB", (128, 128))] * len(prompts)

    monkeypatch.setattr(
        commands.KolorsPipeline, "from_pretrained", lambda *arguments: calls.append(arguments) or Pipe()
    )
    asked = ("--model", "there", "--dtype", "float64", "--device", "cpu", "--limit", "1", "--language", "en")
    options = ("--steps", "7", "--sampler", "heun", "--guidance-scale", "2.5", "--seed", "30", "--batch-size", "6")
    assert run(capsys, "evaluate", *asked, *options, "-o", tmp_path / "scores")[0] == 0
    loaded, *drawn = calls
    assert loaded == ("there", torch.float64, torch.device("cpu"))
    assert [len(call["generator"]) for call in drawn] == [6, 4]
    numbers = [prompt.number for prompt in mini_prompts("en") if commands.is_chosen(prompt, 1)]
    assert [seed - 30 for call in drawn for seed in call["generator"]] == numbers
    for call in drawn:
        assert (call["num_inference_steps"], call["sampler"], call["guidance_scale"]) == (7, "heun", 2.5)


def test_captions_are_chosen_alike_by_one_process_and_by_two(capsys, small_checkpoint, tmp_path):
    arguments = ("evaluate", "--captions", "--device", "cpu", "--model", small_checkpoint, "--limit", "1", "-o")
    status, out, _ = run(capsys, *arguments, tmp_path / "one")
    assert status == 0
    assert out.splitlines()[0].split() == ["fact", "short", "dense", "zh", "en", "all"]
    subprocess.run([*TORCHRUN, *arguments, tmp_path / "two"], check=True, capture_output=True)
    reports = [(tmp_path / name / "captions.json").read_text(encoding="utf8") for name in ("one", "two")]
    assert reports[0] == reports[1]
    assert len(json.loads(reports[0])["results"]) == 38


def test_pictures_are_drawn_alike_by_one_process_and_by_two(capsys, small_checkpoint, tmp_path):
    arguments = ("--limit", "1", "--steps", "1", "--language", "zh", "--device", "cpu", "--batch-size", "5", "-o")
    arguments = ("evaluate", "--model", small_checkpoint, *arguments)
    assert run(capsys, *arguments, tmp_path / "one")[0] == 0
    subprocess.run([*TORCHRUN, *arguments, tmp_path / "two"], check=True, capture_output=True)
    reports = [json.loads((tmp_path / name / "report.json").read_text(encoding="utf8")) for name in ("one", "two")]
    assert reports[0] == reports[1]
    sheets = [Image.open(tmp_path / name / "sheet.png").tobytes() for name in ("one", "two")]
    assert sheets[0] == sheets[1]


def test_a_mistake_is_one_line_of_two_processes(tmp_path):
    """Only the first looks for what is wrong with the folder; the other has nothing to say."""
    arguments = ("train", "mini", "--device", "cpu", "--reuse", "no-such-run")
    done = subprocess.run([*TORCHRUN, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("kolors-ref: error: no-such-run holds no training run") == 1
    assert "[rank" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["train"], "required: what"),
        (["train", "maxi"], "'maxi'"),
        (["train", "mini", "--scale", "0"], "0 is not above 0"),
        (["train", "mini", "--scale", "many"], "many"),
        (["train", "mini", "--ablate", "everything"], "'everything'"),
        (["train", "mini", "--unet-steps", "0"], "0 is not at least 1"),
        (["train", "mini", "--device", "abacus"], "'abacus'"),
        (["train", "mini", "--seed", "-1"], "-1 is not from 0"),
        (["evaluate", "--seed", str(2**63)], "9223372036854775808 is not from 0"),
        (["train", "mini", "--reuse", "no-such-run"], "no-such-run"),
        (["train", "mini", "--ablate", "short-captions", "--ablate", "dense-captions"], "exclude each other"),
        (["train", "mini", "--scale", "x"], "--scale: 'x' is not a number"),
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
