"""python -m weights_conversion: what it prints, its exit status, one line for every mistake."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from weights_conversion import __main__ as cli
from weights_conversion import open_checkpoint


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect(capsys, shared_kolors, pipeline):
    """Layout, networks, parameters, dtypes, sizes, tokenizer."""
    status, out, err = run(capsys, "inspect", shared_kolors)
    assert (status, err) == (0, "")
    assert "layout kolors\n" in out
    count = sum(tensor.numel() for tensor in pipeline.unet.state_dict().values())
    assert f"unet: {count:,} parameters in 840 tensors, float32" in out
    assert "25 tensors, float16" in out
    assert "transformer_depth: (0, 2, 3)" in out
    assert "scheduler: EulerDiscreteScheduler" in out
    assert "tokenizer: text_encoder/tokenizer.model" in out


def test_what_the_terminal_cannot_show(ours_folder, edit_json, tmp_path):
    """Neither names in another script are an error, nor does a file command the terminal."""
    edit_json(ours_folder / "kolors-ref.json", scheduler={"_class_name": "\x1b[2J"})
    ours_folder.rename(tmp_path / "模型")
    command = [sys.executable, "-m", "weights_conversion", "inspect", str(tmp_path / "模型")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u6a21\u578b: layout kolors-ref" in done.stdout
    assert r"scheduler: \x1b[2J" in done.stdout


def test_inspect_a_unet_file(capsys, unet_file):
    """A single network without a config."""
    status, out, _ = run(capsys, "inspect", unet_file)
    assert status == 0
    assert "layout unet-file\nunet: " in out


def test_convert_and_verify(capsys, shared_diffusers, tmp_path):
    """0: the same; 1: different, with the places and the count."""
    assert run(capsys, "convert", shared_diffusers, tmp_path / "a", "--to", "kolors-ref") == (0, "", "")
    assert run(capsys, "verify", shared_diffusers, tmp_path / "a") == (0, "the same tensors\n", "")
    options = ["--to", "diffusers", "--dtype", "bfloat16", "--force"]
    assert run(capsys, "convert", shared_diffusers, tmp_path / "a", *options)[0] == 0
    assert open_checkpoint(tmp_path / "a").networks["vae"].dtypes["quant_conv.weight"] == torch.bfloat16
    status, out, err = run(capsys, "verify", shared_diffusers, tmp_path / "a")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert len(lines) == 11
    assert "torch.float16 in the first and torch.bfloat16 in the second" in lines[0]
    assert lines[-1] == "1017 differences"


def test_a_variant(capsys, shared_fp16, shared_diffusers, tmp_path):
    """Asked for where it is, and where it is not."""
    assert run(capsys, "inspect", shared_fp16, "--variant", "fp16")[0] == 0
    status, _, err = run(capsys, "convert", shared_diffusers, tmp_path / "a", "--to", "diffusers", "--variant", "fp16")
    assert (status, err.count("\n")) == (2, 1)
    assert "fp16" in err


def test_verifying_a_variant(capsys, shared_fp16, diffusers_folder, edit_weights, tmp_path):
    """A folder holds two of each network; the conversion is of those that were asked for."""
    shutil.copytree(shared_fp16, diffusers_folder, dirs_exist_ok=True)
    plain = diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit_weights(plain, lambda tensors: tensors["conv_in.bias"].add_(1))
    options = ["--variant", "fp16"]
    assert run(capsys, "convert", diffusers_folder, tmp_path / "a", "--to", "kolors-ref", *options)[0] == 0
    assert run(capsys, "verify", diffusers_folder, tmp_path / "a")[0] == 1
    assert run(capsys, "verify", diffusers_folder, tmp_path / "a", *options) == (0, "the same tensors\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["explode"],
        ["inspect"],
        ["inspect", "{tmp}/nothing"],
        ["inspect", "{tmp}"],
        ["inspect", "{src}", "--unknown"],
        ["convert", "{src}"],
        ["convert", "{src}", "{tmp}/new"],
        ["convert", "{src}", "{tmp}/new", "--to", "gguf"],
        ["convert", "{src}", "{tmp}/new", "--to", "diffusers", "--dtype", "int8"],
        ["convert", "{src}", "{src}", "--to", "diffusers", "--force"],
        ["convert", "{src}", "{tmp}", "--to", "diffusers"],
        ["convert", "{tmp}", "{tmp}/new", "--to", "diffusers"],
        ["verify", "{src}"],
        ["verify", "{src}", "{tmp}"],
        ["verify", "{src}", "{src}/unet/config.json"],
    ],
)
def test_mistakes(capsys, shared_diffusers, tmp_path, arguments):
    """One line on standard error, exit status 2, nothing written."""
    filled = [argument.format(src=shared_diffusers, tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, *filled)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("weights_conversion")
    assert list(tmp_path.iterdir()) == []


def test_interrupted(capsys, shared_diffusers, tmp_path, monkeypatch):
    """Ctrl-C: exit status 130, one line, no folder."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["weights_conversion.convert"], "write_safetensors", interrupt)
    status, out, err = run(capsys, "convert", shared_diffusers, tmp_path / "a", "--to", "diffusers")
    assert (status, out, err) == (130, "", "weights_conversion: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_terminated(shared_diffusers, tmp_path):
    """As by Ctrl-C, for a machine that shuts down leaves nothing half-written either."""
    code = "import os, runpy, signal, sys\nfrom weights_conversion import convert\n"
    code += "stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "sys.modules['weights_conversion.convert'].write_safetensors = stop\n"
    code += "runpy.run_module('weights_conversion', run_name='__main__')"
    arguments = ["convert", str(shared_diffusers), str(tmp_path / "a"), "--to", "diffusers"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "weights_conversion: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_as_a_program(shared_diffusers, tmp_path):
    """The same through the interpreter: the exit status reaches the shell, and there is no traceback."""
    command = [sys.executable, "-m", "weights_conversion", "verify", str(shared_diffusers), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("weights_conversion: ")
    assert done.stderr.count("\n") == 1
