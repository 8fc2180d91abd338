"""The benchmark itself: the whole tool on small networks, its arithmetic at the official sizes, and its judgement."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.oracle import TOKENIZER

from weights_conversion import open_checkpoint

from . import checkpoint, flops
from .checkpoint import SIZES, official_configs, official_tensors, random_tensor, write_adapter, write_checkpoint
from .compare import Store, main, weight_bytes, write_whole
from .contestants import adapter_folder
from .jobs import STEPS, Job, make_jobs
from .machine import MEASURED, PeakMemory, describe, digest
from .report import (
    ALLOWANCE,
    BOUNDS,
    Results,
    agreement,
    as_contestant,
    composed,
    difference,
    picture_table,
    problems,
    relative_error,
    stage_table,
)
from .worker import measure_stage

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the benchmark is for Linux only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint with an IP-Adapter beside it."""
    path = tmp_path_factory.mktemp("benchmark") / "small"
    write_checkpoint(path, TOKENIZER, "small")
    write_adapter(adapter_folder(path), "small")
    return path


# ---- the tool


def test_tool_measures_prints_and_goes_on(folder, tmp_path, capsys):
    arguments = ["--folder", str(folder), "--only", "picture", "--contestants", "ours,diffusers", "--rounds", "1"]
    arguments += ["--dtype", "float32", "--sides", "64", "--picture-steps", "2", "-o", str(tmp_path / "table.md")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("... done") == 2
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert "| folder to first step, 64² |" in table
    assert "anonymous memory, 64²" in table
    assert "ours and diffusers at 64², 2 steps: pictures differ by at most 0." in table
    assert f"threads {torch.get_num_threads()}" in table
    assert ", s |" not in table  # no seconds from a CPU
    assert main(arguments) == 0
    assert "... done" not in capsys.readouterr().out
    assert not [path for path in folder.parent.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("part", ["text", "image", "unet", "vae"])
@torch.no_grad()
def test_contestants_compute_the_same(folder, part):
    job = Job(part, "ours", "float32", "cpu", side=64, ip_adapter=part in ("image", "unet"))
    outputs = {}
    for contestant in ("ours", "diffusers") if part in ("text", "image") else ("ours", "diffusers", "best"):
        figures, outputs[contestant] = measure_stage(replace(job, contestant=contestant), folder)
        assert figures["seconds"] > 0
    assert 0.02 < outputs["diffusers"].std() < 50
    for contestant, output in outputs.items():
        assert output.shape == outputs["diffusers"].shape
        assert relative_error(output, outputs["diffusers"]) < 1e-4, contestant
    if part == "text":
        _, exact = measure_stage(replace(job, contestant="float32"), folder)
        assert relative_error(exact, outputs["diffusers"]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folder", str(Path(__file__).with_name("checkpoint"))], "inside the repository"),
        (["--folder", "/nowhere/x", "--sides", "500"], "multiples of 32"),
        (["--folder", "/nowhere/x", "--only", "clip"], "choose among text, image, unet, vae, picture"),
        (["--folder", "/nowhere/x", "--rounds", "0"], "whole number of at least 1"),
        (["--folder", "/nowhere/x", "-o", "/nowhere/y/z.md"], "a folder that does not exist"),
        (["--folder", "/nowhere/x", "--tokenizer", "/nowhere/tokenizer.model"], "name Kolors' tokenizer.model"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_checkpoint_of_other_sizes_and_results_of_another_machine_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="of other sizes"):
        write_checkpoint(folder, TOKENIZER, "full")
    (tmp_path / "results.json").write_text(json.dumps({"machine": {"cpu": "abacus"}, "figures": {}, "limits": {}}))
    with pytest.raises(ValueError, match="abacus"):
        Store.read(tmp_path / "results.json", describe("cpu"))


def test_results_of_other_code_are_refused(tmp_path):
    """Every change of a file of ours counts, and so does its name."""
    found = set()
    for folder in MEASURED:
        (tmp_path / folder).mkdir(parents=True)
        for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
            (tmp_path / folder / name).write_text(text)
            found.add(digest(tmp_path))
    assert len(found) == 9
    assert describe("cpu")["code"] == digest(Path(__file__).parents[2])


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    (tmp_path / "table.md").write_text("old")
    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "table.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "old"
    monkeypatch.setattr(checkpoint, "write_network", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "adapter", "small")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_contestants_take_turns():
    jobs = make_jobs(["text", "unet"], ["ours", "diffusers", "best"], [64], 2, "bfloat16", "cpu", False, True, 2)
    order = [(job.part, job.contestant, job.round) for job in jobs]
    text = [("text", name, number) for number in (0, 1) for name in ("ours", "diffusers")]
    assert order == text + [("unet", name, number) for number in (0, 1) for name in ("ours", "diffusers", "best")]
    assert [job.compiled for job in jobs[-3:]] == [True, False, True]
    assert len({job.key for job in jobs}) == len(jobs)


# ---- the checkpoint


def test_checkpoint_is_whole_and_always_the_same(folder, tmp_path):
    write_checkpoint(tmp_path / "twin", TOKENIZER, "small")
    first, twin = open_checkpoint(folder), open_checkpoint(tmp_path / "twin")
    assert set(first.networks) == {"text_encoder", "unet", "vae"}
    for name, network in first.networks.items():
        for key, tensor in network.tensors.items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.count_nonzero() > 0
            assert tensor.equal(twin.networks[name].tensors[key])


def test_full_checkpoint_is_official_in_size():
    tensors = official_tensors(official_configs(SIZES["full"]))
    assert {name: len(network) for name, network in tensors.items()} == {"text_encoder": 200, "unet": 1682, "vae": 248}
    assert 17.5e9 < sum(network.num_bytes() for network in tensors.values()) < 18.5e9
    assert [shard.num_bytes() <= 5 * 10**9 for shard in tensors["text_encoder"].shards()] == [True] * 3


@pytest.mark.parametrize(("name", "mean", "std"), [("q.weight", 0, 1 / 8), ("norm.weight", 1, 0.2), ("q.bias", 0, 0.2)])
def test_random_tensor_has_natural_scale(name, mean, std):
    tensor = random_tensor(name, torch.Size([4096, 64] if name == "q.weight" else [4096])).float()
    assert tensor.mean().item() == pytest.approx(mean, abs=0.02)
    assert tensor.std().item() == pytest.approx(std, rel=0.1)
    assert not tensor.equal(random_tensor(f"other.{name}", tensor.shape).float())


def test_weights_read_are_those_of_the_timed_call(folder):
    unet = open_checkpoint(folder).networks["unet"].tensors
    once = [key for key in unet if "cross_attn.k." in key or "cross_attn.v." in key]
    once += [key for key in unet if key.startswith(("text_proj", "size_embed"))]
    read = sum(tensor.numel() for tensor in unet.values()) - sum(unet[key].numel() for key in once)
    assert weight_bytes(folder, "float32")["unet"] >= 0.99 * 4 * read
    assert weight_bytes(folder, "float32")["unet"] <= 4 * read


# ---- the arithmetic


def test_arithmetic_of_a_picture_is_15_percent_less_than_the_oracles():
    """At the official sizes: 512 x 512, 25 guided steps, a prompt of 25 tokens and the empty one."""
    stages = flops.both("full", 512)
    ours, theirs = stages["ours"], stages["diffusers"]
    assert flops.total(ours, STEPS) < 0.85 * flops.total(theirs, STEPS)

    attention = lambda keys: sum(  # by hand: (blocks, pixels, channels) of both levels, self- and cross-attention
        4 * 2 * blocks * pixels * (pixels + keys) * channels
        for blocks, pixels, channels in ((10, 32 * 32, 640), (60, 16 * 16, 1280))
    )
    assert ours["step"]["attention"] == attention(keys=32)
    assert theirs["step"]["attention"] == attention(keys=256)
    # Upsampling and convolution in one: 4 of 9 taps, in the UNet with a row and a column more; (side, channels) before.
    less = lambda side, channels, more=0: 2 * 4 * (9 * side**2 - 4 * (side + more) ** 2) * channels**2
    saved = theirs["step"]["convolution"] - ours["step"]["convolution"]
    assert saved == 2 * (less(16, 1280, more=1) + less(32, 640, more=1))
    width, heads, hidden = 4096, 2 * 128, 13696
    layer = 2 * width * (width + 2 * heads) + 2 * width * width + 2 * 3 * width * hidden
    assert theirs["text"] == {
        "linear": 2 * 256 * 28 * layer,
        "convolution": 0,
        "attention": 2 * 28 * 4 * 256**2 * width,
    }
    saved = theirs["decode"]["convolution"] - ours["decode"]["convolution"]
    assert saved == less(64, 512) + less(128, 512) + less(256, 256)
    assert ours["decode"]["linear"] == theirs["decode"]["linear"]
    assert ours["decode"]["attention"] == 4 * (64 * 64) ** 2 * 512
    # What ours computes once a picture: keys and values, the text's projection, sizes; and one timestep for two rows.
    keys_values = 2 * (2 * 256) * 2 * 2048 * (10 * 640 + 60 * 1280)
    text_proj, size_embed, time_embed = 2 * 2 * 256 * 4096 * 2048, 2 * 2 * (5632 + 1280) * 1280, 2 * (320 + 1280) * 1280
    saved = theirs["step"]["linear"] - ours["step"]["linear"]
    assert saved == keys_values + text_proj + size_embed + time_embed


def test_arithmetic_with_an_ip_adapter():
    ours, theirs = flops.ours(SIZES["small"], 64), flops.diffusers(SIZES["small"], 64)
    stages = flops.both("small", 64, ip_adapter=True)
    assert sum(stages["ours"]["image"].values()) > 0
    extra = sum(stages["ours"]["step"].values()) - sum(ours["step"].values())
    assert 0 < extra < sum(stages["diffusers"]["step"].values()) - sum(theirs["step"].values())


# ---- the judgement


def results(tmp_path, pictures):
    """Results of a picture with the given outputs."""
    measured = {}
    for contestant, output in pictures.items():
        job = Job("picture", contestant, "float32", "cpu", side=64, steps=2)
        measured[job.key] = {"ready": 1.0}
        torch.save(output, tmp_path / f"{job.key}.pt")
    return Results(measured, tmp_path, {}, {}, {})


@pytest.mark.parametrize(("change", "agree"), [(0.0, True), (0.9, True), (1.1, False), (float("nan"), False)])
def test_pictures_that_differ_are_named(tmp_path, change, agree):
    ours = Job("picture", "ours", "float32", "cpu", side=64, steps=2)
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    changed = picture.clone()
    changed[0, 5, 5, 1] += change / 255
    said, wrong = agreement(results(tmp_path, {"ours": changed, "diffusers": picture}), [ours], compiled=False)
    assert len(said) == 1
    assert (wrong == []) == agree
    said, wrong = agreement(results(tmp_path, {"ours": changed, "diffusers": picture}), [ours], False, judged=False)
    assert "(not judged)" in said[0]
    assert wrong == []


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_no_bound_allows_another_picture(dtype):
    one, other = (torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert difference(one, other).exceeds(dtype)
    assert difference(one, one[:, :32]).exceeds(dtype)
    assert not difference(one, one).exceeds(dtype)


def test_failures_and_too_much_memory_are_named(tmp_path):
    ours = Job("picture", "ours", "bfloat16", "cpu", side=512, steps=2)
    judge = lambda in_place=True, **figures: problems(
        Results({ours.key: figures}, tmp_path, {}, {}, {}), [ours], in_place
    )
    assert judge(anonymous=ALLOWANCE) == []
    assert judge(anonymous=ALLOWANCE + 1, in_place=False) == []
    assert "3 GB are allowed" in judge(anonymous=ALLOWANCE + 1)[0]
    assert "killed by signal 9" in judge(failed="killed by signal 9")[0]


@pytest.mark.parametrize(
    ("dtype", "ours", "diffusers", "fp32", "words"),
    [
        ("bfloat16", 1.05, 1.0, None, None),
        ("bfloat16", -1.0, 1.0, None, "from diffusers"),
        ("bfloat16", 1.04, 1.03, 1.0, None),
        ("bfloat16", 1.05, 1.03, 1.0, "from fp32"),
        ("bfloat16", float("nan"), 1.0, 1.0, "from fp32"),
        ("float32", 1.00001, 1.0, 1.0, None),
        ("float32", 1.001, 1.0, 1.0, "from diffusers"),
    ],
)
def test_wrong_outputs_of_stages_are_named(tmp_path, dtype, ours, diffusers, fp32, words):
    job = Job("unet", "ours", dtype, "cpu", side=512)
    figures = {}
    for contestant, value in (("ours", ours), ("diffusers", diffusers), ("float32", fp32)):
        if value is not None:
            key = as_contestant(job, contestant).key
            figures[key] = {"seconds": 1.0}
            torch.save(torch.full((8,), value), tmp_path / f"{key}.pt")
    wrong = problems(Results(figures, tmp_path, {}, {}, {}), [job], True)
    assert [words in problem for problem in wrong] == [True] * (words is not None)


def test_whole_picture_is_added_up_from_medians(tmp_path):
    picture = Job("picture", "ours", "bfloat16", "cpu", side=512, steps=2)
    text = Job("text", "ours", "bfloat16", "cpu")
    step, decode = (replace(picture, part=part, steps=0) for part in ("unet", "vae"))
    figures = {replace(text, round=i).key: {"seconds": s} for i, s in enumerate((3.0, 1.0, 2.0))}
    figures |= {step.key: {"seconds": 10.0}, decode.key: {"seconds": 4.0}}
    measured = Results(figures, tmp_path, {}, {}, {})
    assert composed(measured, picture) == 2 + STEPS * 10 + 4
    assert composed(measured, replace(picture, side=1024)) is None
    theirs = {replace(job, contestant="diffusers").key: {"seconds": 5.0} for job in (text, step, decode)}
    table = picture_table(replace(measured, figures=figures | theirs), [picture], compiled=False)
    assert f"| picture, 25 steps, 512² (added up from the stages) | {135 / 256:.2f} |" in table


def test_stages_are_shown_as_ratios_and_shares_of_the_limits(tmp_path):
    ours = Job("unet", "ours", "bfloat16", "cpu", side=512)
    theirs, best = (replace(ours, contestant=name) for name in ("diffusers", "best"))
    figures = {job.key: {"seconds": s} for job, s in ((ours, 4.0), (theirs, 6.0), (best, 5.0))}
    counted = {(512, False): {"ours": {"step": {"linear": 20, "attention": 20}}, "diffusers": {"step": {"linear": 45}}}}
    measured = Results(figures, tmp_path, counted, {"flops": 20.0, "bytes": 50.0}, {"unet": 50})
    row = "| UNet, guided step 512² | 1.50 | 1.25 | 50% | 38% | 25% |  |  |  |"
    assert stage_table(measured, [ours], compiled=False).splitlines()[-1] == row
    torch.save(torch.tensor([3.0, 4.0]), tmp_path / f"{theirs.key}.pt")
    torch.save(torch.tensor([3.0, 4.5]), tmp_path / f"{ours.key}.pt")
    assert "| 1.0e-01 |  |  |" in stage_table(measured, [ours], compiled=False)
    gpu = {replace(job, device="cuda").key: {"seconds": s} for job, s in ((ours, 4.0), (theirs, 6.0), (best, 5.0))}
    table = stage_table(replace(measured, figures=gpu), [replace(ours, device="cuda")], compiled=False)
    assert "| 4.000 | 6.000 | 5.000 | 1.50 | 1.25 |" in table


def test_peak_memory_sees_what_is_gone():
    with PeakMemory() as memory:
        torch.ones(2**28, dtype=torch.uint8)  # too large for glibc to keep
    with PeakMemory() as later:
        pass
    assert memory.peaks["VmHWM"] >= memory.peaks["RssAnon"]
    assert memory.peaks["VmHWM"] >= later.peaks["VmHWM"] + 0.9 * 2**28
