"""The full-size benchmark itself, tried on tiny networks."""

import json
from pathlib import Path

import pytest
import torch
from full_size import ALLOWANCE, TOKENIZER, main, table, verdict
from full_size_checkpoint import FULL, official_configs, official_tensors, random_tensor, write_checkpoint
from full_size_worker import Job, PeakMemory, timed

from weights_conversion import open_checkpoint

needs_tokenizer = pytest.mark.skipif(
    not TOKENIZER.is_file(), reason="Kolors' tokenizer.model is not at ../shared/tokenizer"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp("benchmark") / "tiny"
    write_checkpoint(path, TOKENIZER, tiny=True)
    return path


@needs_tokenizer
def test_benchmark_measures_compares_and_goes_on(folder, capsys):
    arguments = ["--tiny", "--folder", str(folder), "--stages", "unet", "--dtype", "float32", "--sizes", "32"]
    assert main([*arguments, "--library", "ours"]) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1/3" not in printed
    assert "3/3 unet_diffusers-float32-32" in printed
    results = json.loads(folder.with_name("tiny.json").read_text())["results"]
    assert set(results) == {f"unet_{run}-float32-32" for run in ("packed", "padded", "diffusers")}
    for figures in results.values():
        assert figures["from_diffusers"] < 1e-5
        assert 0.1 < figures["output_std"] < 10
        assert figures["resident"] >= figures["needed"] >= figures["anonymous"] > figures["weights"] > 0
    assert printed.count("| UNet step 32² | float32 |") == 3


@needs_tokenizer
def test_results_of_another_machine_are_refused(folder, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"machine": {"cpu": "abacus"}, "results": {}}))
    assert main(["--tiny", "--folder", str(folder), "--json", str(tmp_path / "results.json")]) == 2
    assert "abacus" in capsys.readouterr().err


@needs_tokenizer
def test_checkpoint_is_whole_and_always_the_same(folder, tmp_path):
    write_checkpoint(tmp_path / "twin", TOKENIZER, tiny=True)
    checkpoint, twin = open_checkpoint(folder), open_checkpoint(tmp_path / "twin")
    assert set(checkpoint.networks) == {"text_encoder", "unet", "vae"}
    for name, network in checkpoint.networks.items():
        for key, tensor in network.tensors.items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.count_nonzero() > 0
            assert tensor.equal(twin.networks[name].tensors[key])


@needs_tokenizer
def test_checkpoint_of_other_sizes_is_refused(folder):
    with pytest.raises(ValueError, match="of other sizes"):
        write_checkpoint(folder, TOKENIZER, tiny=False)


def test_full_checkpoint_is_official_in_size():
    tensors = official_tensors(official_configs(FULL))
    assert {name: len(network) for name, network in tensors.items()} == {"text_encoder": 200, "unet": 1682, "vae": 248}
    assert 17.5e9 < sum(network.num_bytes() for network in tensors.values()) < 18.5e9
    assert [shard.num_bytes() <= 5 * 10**9 for shard in tensors["text_encoder"].shards()] == [True] * 3


@pytest.mark.parametrize(("name", "mean", "std"), [("q.weight", 0, 1 / 8), ("norm.weight", 1, 0.2), ("q.bias", 0, 0.2)])
def test_random_tensor_has_natural_scale(name, mean, std):
    tensor = random_tensor(name, torch.Size([4096, 64] if name == "q.weight" else [4096])).float()
    assert tensor.mean().item() == pytest.approx(mean, abs=0.02)
    assert tensor.std().item() == pytest.approx(std, rel=0.1)
    assert not tensor.equal(random_tensor(f"other.{name}", tensor.shape).float())


def test_missing_tokenizer_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        write_checkpoint(tmp_path / "new", tmp_path / "tokenizer.model", tiny=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folder", str(Path(__file__).with_name("checkpoint"))], "inside the repository"),
        (["--folder", "/nowhere/x", "--sizes", "500"], "multiples of 32"),
        (["--folder", "/nowhere/x", "--stages", "clip"], "choose among text, unet, vae"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tiny", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_peak_memory_sees_what_is_gone():
    with PeakMemory() as memory:
        torch.ones(2**24)
    with PeakMemory() as later:
        pass
    assert memory.peaks["VmHWM"] >= memory.peaks["RssAnon"]
    assert memory.peaks["VmHWM"] >= later.peaks["RssAnon"] + 2**24


def test_short_first_call_is_not_counted():
    calls = []
    counted, _ = timed(lambda: calls.append(1) or torch.zeros(1), steps=2)
    assert (len(counted), len(calls)) == (2, 3)


def test_too_much_memory_and_failures_are_named():
    good = {
        **{"load_seconds": 1.0, "seconds": 2.0, "cpu_seconds": 4.0, "weights": 10**9},
        **{"needed": 2 * 10**9, "resident": 2 * 10**9, "anonymous": 10**9, "mapped": 10**9},
    }
    jobs = [Job("vae_ours", "bfloat16", 512), Job("vae_diffusers", "bfloat16", 512), Job("vae_ours", "float32", 512)]
    results = {job.key: job.__dict__ | good for job in jobs}
    assert verdict(results) == []
    results["vae_ours-bfloat16-512"]["needed"] = 10**9 + ALLOWANCE + 1
    results["vae_ours-float32-512"] = jobs[2].__dict__ | {"failed": "killed by signal 9"}
    assert [problem.split()[0] for problem in verdict(results)] == ["vae_ours-bfloat16-512", "vae_ours-float32-512"]
    assert "killed by signal 9" in table(results)
