"""What people type: pictures that can be repeated, and one line for every mistake."""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_picture_file import png_with

from kolors_ref import KolorsPipeline, cli
from kolors_ref.picture_file import read_parameters
from weights_conversion.files import FLOATS

SMALL = ["--height", "64", "--width", "64", "--steps", "1"]
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="there is a /proc on Linux only")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource
from kolors_ref import cli
cli.main(["evaluate", "--model", "nowhere"])
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1)
before, tensor = faults(), torch.zeros(1 << 25)
tensor.fill_(1)
print(faults() - before)
"""
"""Counts the page faults of 128 MB of a tensor."""


@pytest.fixture
def kolors(small_checkpoint, small_pipe, tmp_path, monkeypatch, capsys):
    """kolors(*arguments) -> exit status, standard output, standard error; in an empty folder, the model preloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(KolorsPipeline, "from_pretrained", lambda *arguments: loads.append(arguments) or small_pipe)
    loads = []

    def run(*arguments, model=small_checkpoint):
        arguments = [*arguments, *([] if model is None else ["--model", model])]
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    run.loads = loads
    return run


@pytest.fixture
def expect_refused(kolors, tmp_path):
    """expect_refused(*arguments, mentions=...): one line, exit status 2, and nothing written."""

    def run(*arguments, mentions, model="small"):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = kolors(*arguments, model=model)
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("kolors-ref: error: ")
        assert mentions in err
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def patched(small_pipe):
    """patched(part, name, function of the tensor): a parameter of the preloaded model is another one for this test."""

    def patch(part, name, function):
        module = getattr(small_pipe, part)
        state = {key: function(value.clone()) if key == name else value for key, value in module.state_dict().items()}
        kept = dict(module.state_dict())
        assert name in kept
        module.load_state_dict(state, assign=True)
        undo.append(lambda: module.load_state_dict(kept, assign=True))

    undo = []
    yield patch
    for step in reversed(undo):
        step()


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_a_picture(kolors):
    status, out, err = kolors("generate", "a cat", *SMALL, "--seed", "7", "-o", "cat.png")
    assert (status, out, err) == (0, "cat.png\n", "")
    assert os.listdir() == ["cat.png"]
    assert Image.open("cat.png").size == (64, 64)


def test_without_the_commands_name(kolors):
    """`kolors-ref PROMPT` is `kolors-ref generate PROMPT`, options first or last."""
    kolors("generate", "a cat", *SMALL, "--seed", "7", "-o", "a.png")
    kolors("a cat", *SMALL, "--seed", "7", "-o", "b.png")
    kolors(*SMALL, "--seed", "7", "-o", "c.png", "a cat")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() == Path("c.png").read_bytes()


def test_it_is_the_pipelines_picture(kolors, small_pipe):
    kolors("a cat", *SMALL, "--seed", "7", "--negative-prompt", "ugly", "--guidance-scale", "3", "-o", "a.png")
    generator = torch.Generator().manual_seed(7)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 1}
    image = small_pipe("a cat", negative_prompt="ugly", guidance_scale=3.0, generator=generator, **sizes)[0]
    assert pixels("a.png") == image.tobytes()


def test_a_seed_that_is_drawn_is_printed(kolors):
    """And is another one each time; the file carries it in its name."""
    seeds = []
    for _ in range(2):
        status, out, err = kolors("a cat", *SMALL)
        seed = re.fullmatch(r"seed (\d+)\n", err)[1]
        assert (status, out) == (0, f"kolors-{seed}.png\n")
        seeds.append(seed)
    assert seeds[0] != seeds[1]
    assert pixels(f"kolors-{seeds[0]}.png") != pixels(f"kolors-{seeds[1]}.png")
    kolors("a cat", *SMALL, "--seed", seeds[0], "-o", "again.png")
    assert pixels("again.png") == pixels(f"kolors-{seeds[0]}.png")


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_the_bounds_of_a_seed(kolors, seed):
    assert kolors("a cat", *SMALL, "--seed", seed)[:2] == (0, f"kolors-{seed}.png\n")
    assert read_parameters(Path(f"kolors-{seed}.png"))["seed"] == seed


def test_several_prompts_and_pictures(kolors):
    """In one file each, the pictures of a prompt one after the other."""
    status, out, _ = kolors("a cat", "一只狗", *SMALL, "--num-images", "2", "--seed", "1", "-o", "a.png")
    names = [f"a-{index}.png" for index in range(4)]
    assert (status, out.split()) == (0, names)
    assert sorted(os.listdir()) == names
    assert len({pixels(name) for name in names}) == 4
    assert [read_parameters(Path(name))["index"] for name in names] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "一只猫坐在红色的沙发上",
        "🐈‍⬛ é \t ＡＢＣ",
        "a very long prompt " * 500,
        "[gMASK] sop",
        "100% 'quoted' \"$HOME\"",
    ],
    ids=lambda prompt: prompt[:12],
)
def test_prompts_of_all_kinds(kolors, prompt):
    status, out, _ = kolors(prompt, *SMALL, "--seed", "1", "-o", "图 像.png")
    assert (status, out) == (0, "图 像.png\n")
    assert read_parameters(Path("图 像.png"))["prompt"] == [prompt]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (72, 40), (8, 256)])
def test_sizes_of_all_kinds(kolors, height, width):
    """Down to one latent, and where the UNet's levels do not halve evenly."""
    assert kolors("a cat", "--steps", "1", "--height", height, "--width", width, "-o", "a.png")[0] == 0
    assert Image.open("a.png").size == (width, height)


def test_the_native_size_is_the_default(kolors):
    assert kolors("a cat", "--steps", "1", "-o", "a.png")[0] == 0
    assert Image.open("a.png").size == (128, 128)


def test_a_picture_to_start_from(kolors):
    """Its size is taken; at strength 0 nothing is redone."""
    Image.effect_noise((72, 48), 60).convert("RGB").save("start.jpg")
    assert kolors("a cat", "--image", "start.jpg", "--strength", "0", "--seed", "1", "-o", "a.png")[0] == 0
    assert kolors("a cat", "--image", "start.jpg", "--steps", "2", "--seed", "1", "-o", "b.png")[0] == 0
    assert Image.open("a.png").size == Image.open("b.png").size == (72, 48)
    assert pixels("a.png") != pixels("b.png")


def test_what_is_loaded_is_what_was_asked_for(kolors, small_pipe, small_checkpoint, monkeypatch):
    """And again with --repeat, where the type is the one that was computed in."""
    for file in ("unet.safetensors", "a.bin"):
        Path(file).write_bytes(b"weights")
    Path("clip").mkdir()
    options = ["--dtype", "float16", "--device", "cuda:1", "--variant", "fp16", "--offload", "model"]
    adapters = []
    monkeypatch.setattr(small_pipe, "load_ip_adapter", lambda *arguments: adapters.append(arguments))
    monkeypatch.setattr(small_pipe, "denoise", lambda **arguments: 1 / 0)
    Image.effect_noise((64, 64), 60).save("reference.png")
    reference = ["--ip-adapter", "a.bin", "--ip-image", "reference.png", "--image-encoder", "clip"]
    kolors("a cat", *SMALL, *options, "--unet", "unet.safetensors", *reference, "--seed", "5", "-o", "a.png")
    monkeypatch.undo()
    assert kolors.loads == [(str(small_checkpoint), torch.float16, "cuda:1", "fp16", "unet.safetensors", "model")]
    assert adapters == [("a.bin", "clip")]


def test_what_is_loaded_again(kolors, small_checkpoint):
    kolors("a cat", *SMALL, "--offload", "stream", "--variant", "fp16", "--seed", "5", "-o", "a.png")
    kolors("--repeat", "a.png", "-o", "b.png", model=None)
    first, again = kolors.loads
    assert first == (str(small_checkpoint), None, "cpu", "fp16", None, "stream")
    assert again == (str(small_checkpoint), torch.float32, "cpu", "fp16", None, "stream")


@pytest.mark.parametrize(
    ("error", "mentions"),
    [
        (MemoryError(), "out of memory; try --offload stream, or a smaller picture"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), "out of memory (CUDA out of memory. Tried); try --offload"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (DefaultCPUAllocator"),
    ],
)
def test_too_little_memory(expect_refused, small_pipe, monkeypatch, error, mentions):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(small_pipe, "decode", fail)
    expect_refused("a cat", *SMALL, "--seed", "5", "-o", "a.png", mentions=mentions)


def test_other_errors_of_torch_are_not_hidden(kolors, small_pipe, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(small_pipe, "decode", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        kolors("a cat", *SMALL, "--seed", "5", "-o", "a.png")


# ---------------------------------------------------------------------------------------------------------------------
# --repeat
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "euler-ancestral", "--steps", "2"],
        ["--negative-prompt", "丑", "--guidance-scale", "2.5", "--max-sequence-length", "16"],
        ["--guidance-scale", "1", "--width", "72"],
        ["--num-images", "2"],
        ["--guidance-interval", "0.2,0.6", "--steps", "4", "--decoding", "tiled", "--offload", "stream"],
    ],
    ids=" ".join,
)
def test_repeat_makes_the_same_picture(kolors, options):
    """Each of them, where there were several; under its default name too."""
    prompts = ["a cat", *(["another prompt"] if "--num-images" in options else [])]
    assert kolors(*prompts, *SMALL, "--seed", "5", *options, "-o", "a.png")[0] == 0
    paths = sorted(Path().glob("a*.png"))
    assert len(paths) == (4 if "--num-images" in options else 1)
    for path in paths:
        status, out, err = kolors("generate", "--repeat", path, model=None)
        assert (status, out, err) == (0, "kolors-5.png\n", "")
        assert Path("kolors-5.png").read_bytes() == path.read_bytes()


def test_every_format_of_weights_can_be_repeated():
    """A picture records the one that it was computed in."""
    assert set(cli.DTYPES) == {str(dtype).removeprefix("torch.") for dtype in FLOATS}


def test_repeat_of_a_picture_started_from_another(kolors):
    Image.effect_noise((64, 64), 60).save("start.png")
    kolors("a cat", "--image", "start.png", "--strength", "0.5", "--steps", "4", "--seed", "5", "-o", "a.png")
    kolors("--repeat", "a.png", "-o", "b.png", model=None)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_repeat_with_changes(kolors):
    """Options that are given win over the recorded ones."""
    kolors("a cat", *SMALL, "--seed", "5", "-o", "a.png")
    kolors("a dog", "--repeat", "a.png", "--seed", "6", "--sampler", "ddim", "-o", "b.png", model=None)
    kolors("a dog", *SMALL, "--seed", "6", "--sampler", "ddim", "-o", "c.png")
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()
    assert pixels("a.png") != pixels("b.png")


def test_repeat_with_another_lora_does_not_add_to_the_recorded_one(tmp_path):
    """Nor with other adapters or reference pictures; the same parser reads all three."""
    png_with(tmp_path / "a.png", f'{{{RECORD}, "lora": ["x.safetensors:1"], "ip_adapter": ["a.bin"]}}')
    typed = ["--lora", "y.safetensors:0.5", "--lora", "z.safetensors", "--ip-image", "b.jpg"]
    options = cli.parse(["--repeat", str(tmp_path / "a.png"), *typed])
    assert options.lora == ["y.safetensors:0.5", "z.safetensors"]
    assert (options.ip_adapter, options.ip_image) == (["a.bin"], ["b.jpg"])


def test_repeat_with_another_unet_of_the_same_name(kolors, expect_refused):
    unet = Path("unet.safetensors")
    unet.write_bytes(b"weights")
    kolors("a cat", *SMALL, "--unet", unet, "--seed", "5", "-o", "a.png")
    assert kolors("--repeat", "a.png", "-o", "b.png", model=None)[0] == 0
    unet.write_bytes(b"other weights")
    expect_refused("--repeat", "a.png", "-o", "c.png", mentions="unet.safetensors is no longer the file", model=None)
    assert kolors("--repeat", "a.png", "--unet", "./unet.safetensors", "-o", "c.png", model=None)[0] == 0


def test_repeat_does_not_overwrite_what_it_repeats(kolors, expect_refused):
    kolors("a cat", *SMALL, "--seed", "5")
    expect_refused("--repeat", "kolors-5.png", "--steps", "2", mentions="kolors-5.png would be overwritten", model=None)
    assert kolors("--repeat", "kolors-5.png", "-o", "kolors-5.png", model=None)[0] == 0


def test_repeat_of_a_repeat(kolors):
    kolors("a", "b", *SMALL, "--seed", "5", "-o", "a.png")
    kolors("--repeat", "a-1.png", "-o", "b.png", model=None)
    kolors("--repeat", "b.png", "-o", "c.png", model=None)
    assert Path("a-1.png").read_bytes() == Path("b.png").read_bytes() == Path("c.png").read_bytes()


RECORD = '"prompt": ["a cat"], "model": "small", "height": 64, "width": 64, "steps": 1, "seed": 5'


def test_a_picture_does_not_say_where_to_write(kolors, tmp_path):
    """A picture from somewhere else must not choose the file that is overwritten."""
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"precious")
    png_with(tmp_path / "a.png", f'{{{RECORD}, "output": "{victim}", "repeat": "b.png", "command": "x", "help": 1}}')
    assert kolors("--repeat", "a.png", model=None)[:2] == (0, "kolors-5.png\n")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        (f'{{{RECORD}, "inputs": [1], "index": 7}}', "picture 7"),
        ("{}", "a prompt is missing"),
        ("[]", "not understood"),
        ("{", "cannot be read"),
        (f'{{{RECORD}, "prompt": 3}}', "prompt must be"),
        (f'{{{RECORD}, "prompt": [3]}}', "prompt must be"),
        (f'{{{RECORD}, "prompt": {{"a": 1}}}}', "prompt must be"),
        (f'{{{RECORD}, "steps": "many"}}', "steps"),
        (f'{{{RECORD}, "steps": {{"a": 1}}}}', "steps"),
        (f'{{{RECORD}, "steps": 1.5}}', "steps"),
        (f'{{{RECORD}, "steps": true}}', "steps"),
        (f'{{{RECORD}, "height": "64.5"}}', "height"),
        (f'{{{RECORD}, "seed": "x"}}', "seed"),
        (f'{{{RECORD}, "seed": 1.5}}', "seed"),
        (f'{{{RECORD}, "seed": -1}}', "seed"),
        (f'{{{RECORD}, "guidance_scale": NaN}}', "guidance_scale"),
        (f'{{{RECORD}, "dtype": "nonsense"}}', "dtype"),
        (f'{{{RECORD}, "dtype": "nn"}}', "dtype"),
        (f'{{{RECORD}, "dtype": 16}}', "dtype"),
        (f'{{{RECORD}, "image": "nothing.png"}}', "nothing.png"),
        (f'{{{RECORD}, "image": 3}}', "3, which the picture"),
        (f'{{{RECORD}, "sampler": 3}}', "sampler"),
        (f'{{{RECORD}, "strength": "1e9"}}', "strength"),
        (f'{{{RECORD}, "index": "x"}}', "picture x"),
        (f'{{{RECORD}, "index": -1}}', "picture -1"),
        (f'{{{RECORD}, "index": 7}}', "picture 7"),
        (f'{{{RECORD}, "index": [0]}}', "picture [0]"),
    ],
)
def test_records_that_were_edited(expect_refused, tmp_path, text, mentions):
    """Wrong types and values in the JSON of a picture are one line, whether argparse or the pipeline finds them."""
    png_with(tmp_path / "a.png", text)
    expect_refused("--repeat", "a.png", mentions=mentions, model=None)


def test_files_that_cannot_be_repeated(expect_refused, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    expect_refused("--repeat", "missing.png", mentions="there is no picture missing.png", model=None)
    expect_refused("--repeat", "text.png", mentions="text.png cannot be read", model=None)
    expect_refused("--repeat", "plain.png", mentions="plain.png holds no parameters", model=None)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["a cat", "--guidance-interval", "0.5"], "guidance_interval"),
        (["a cat", "--guidance-interval", "half,all"], "--guidance-interval is half,all"),
        (["a cat", "--guidance-interval", "0.8,0.2"], "guidance_interval"),
        (["a cat", "--offload", "disk"], "'disk'"),
        (["a cat", "--decoding", "half"], "'half'"),
        (["generate"], "a prompt is missing"),
        (["--steps", "3"], "a prompt is missing"),
        (["cat", "--steps", "0"], "num_inference_steps is 0"),
        (["cat", "--steps", "-5"], "num_inference_steps is -5"),
        (["cat", "--steps", "1101"], "1101"),
        (["cat", "--steps", "1000000000000"], "1000000000000"),
        (["cat", "--steps", "two"], "--steps"),
        (["cat", "--steps", "1.5"], "--steps"),
        (["cat", "--height", "63"], "height is 63"),
        (["cat", "--width", "4"], "width is 4"),
        (["cat", "--width", "0"], "width is 0"),
        (["cat", "--height", "-64"], "height is -64"),
        (["cat", "--height", "8200"], "height is 8200"),
        (["cat", "--width", "800000000000000000000"], "width is 800000000000000000000"),
        (["cat", "--guidance-scale", "nan"], "guidance_scale is nan"),
        (["cat", "--guidance-scale", "inf"], "guidance_scale is inf"),
        (["cat", "--guidance-scale", "much"], "--guidance-scale"),
        (["cat", "--strength", "1.1"], "strength is 1.1"),
        (["cat", "--strength", "-0.1"], "strength is -0.1"),
        (["cat", "--strength", "nan"], "strength is nan"),
        (["cat", "--seed", "-1"], "-1 is not from 0"),
        (["cat", "--seed", str(2**63)], "9223372036854775808 is not from 0"),
        (["cat", "--seed", "x"], "--seed: 'x' is not a whole number"),
        (["cat", "--ip-image", "a.png"], "--ip-image does nothing without --ip-adapter"),
        (["cat", "--ip-adapter", "a.bin"], "--ip-adapter does nothing without --ip-image"),
        (["cat", "--image-encoder", "clip"], "--image-encoder does nothing without --ip-adapter"),
        (["cat", "--num-images", "0"], "num_images_per_prompt is 0"),
        (["cat", "--num-images", "1000000000000"], "num_images_per_prompt is 1000000000000"),
        (["cat", "--max-sequence-length", "0"], "max_sequence_length is 0"),
        (["cat", "--max-sequence-length", "1"], "at least 2"),
        (["cat", "--max-sequence-length", "1000000000000"], "max_sequence_length is 1000000000000"),
        (["cat", "--sampler", "eular"], "'euler'"),
        (["cat", "--sampler", ""], "sampler"),
        (["cat", "--dtype", "int8"], "--dtype"),
        (["cat", "--image", "missing.png"], "missing.png, which"),
        (["cat", "--image", "."], "no picture file"),
        (["cat", "--nonsense"], "--nonsense"),
        (["cat", "--version"], "--version"),
        (["\udcff\udcfe"], "valid Unicode"),
        (["cat", "--negative-prompt", "\udcff"], "valid Unicode"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(expect_refused, arguments, mentions):
    sizes = [] if {"--height", "--width", "--steps"} & set(arguments) else SMALL
    seed = [] if "--seed" in arguments else ["--seed", "1"]
    expect_refused(*arguments, *sizes, *seed, mentions=mentions)


@pytest.mark.parametrize(
    "options",
    [
        ("--lora", "missing"),
        ("--lora", "missing:0.5"),
        ("--unet", "missing"),
        ("--ip-adapter", "missing", "--ip-image", "picture.png"),
        ("--ip-adapter", "picture.png", "--ip-image", "missing"),
        ("--ip-adapter", "picture.png", "--ip-image", "picture.png", "--image-encoder", "missing"),
    ],
)
def test_missing_files_are_noticed_before_a_model_is_loaded(expect_refused, tmp_path, options):
    """Loading 18 GB takes long. A model that is nowhere either would be complained of, if it had been looked for."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    refused = "which the picture is to be made with, does not exist"
    expect_refused("cat", *options, mentions=f"missing, {refused}", model="nowhere")
    adapter = ("--ip-adapter", "picture.png", "--ip-image", "picture.png")
    expect_refused("cat", *adapter, mentions=f"image_encoder, {refused}", model="nowhere")


def test_no_arguments(expect_refused):
    expect_refused(mentions="COMMAND", model=None)


def test_the_embedded_model_is_the_default():
    assert cli.parse(["a cat"]).model == "mini"


@pytest.mark.parametrize(
    ("output", "mentions"),
    [
        ("a.jpg", "must end in .png"),
        ("", "must end in .png"),
        ("folder.png", "is a folder"),
        ("missing/a.png", "does not exist"),
        ("file/a.png", "does not exist"),
        ("x" * 300 + ".png", "too long"),
        pytest.param("/proc/a.png", "cannot be written", marks=needs_linux),
    ],
)
def test_output_paths_that_cannot_be_written(expect_refused, tmp_path, monkeypatch, output, mentions):
    """Noticed before the model is loaded."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(KolorsPipeline, "from_pretrained")
    expect_refused("a cat", "-o", output, mentions=mentions)


def test_a_full_disk(expect_refused, tmp_path, monkeypatch):
    """Half of the file is written when the space ends; an older picture of that name stays."""
    (tmp_path / "a.png").write_bytes(b"an older picture")

    def half(image, target, **options):
        target.write_bytes(b"\x89PNG half of a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    expect_refused(
        "a cat", *SMALL, "--seed", "1", "-o", "a.png", mentions="a.png cannot be written: No space left on device"
    )
    assert (tmp_path / "a.png").read_bytes() == b"an older picture"


def test_names_that_the_terminal_cannot_show(kolors, tmp_path, monkeypatch):
    """A finished picture is not an error because its name cannot be printed."""
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert kolors("a cat", *SMALL, "--seed", "1", "-o", "猫.png")[0] == 0
    assert Image.open(tmp_path / "猫.png").size == (64, 64)
    assert ".png" in (tmp_path / "log").read_text()


def test_several_files_that_cannot_all_be_written(expect_refused, tmp_path):
    """Found before anything is computed: the names are those with numbers."""
    (tmp_path / "z-1.png").mkdir()
    expect_refused("a cat", *SMALL, "--num-images", "2", "-o", "z.png", mentions="z-1.png is a folder")
    name = "z" * 240 + ".png"  # fits, with what it has while it is not whole, but not with a number as well
    expect_refused("a cat", *SMALL, "--num-images", "2", "-o", name, mentions="File name too long")


def test_a_message_does_not_command_the_terminal(expect_refused, tmp_path):
    record = json.dumps({"prompt": ["a cat"], "model": "small", "seed": 5, "index": "\x1b[31mred\x07"})
    png_with(tmp_path / "a.png", record)
    expect_refused("--repeat", "a.png", mentions=r"picture \x1b[31mred\x07 of its run", model=None)


def test_a_name_that_is_not_utf8_can_be_repeated(kolors):
    """The name of a start picture, which the parameters hold."""
    try:
        Image.effect_noise((64, 64), 60).save("start-\udcff.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    kolors("a cat", "--image", "start-\udcff.png", "--steps", "2", "--seed", "5", "-o", "a.png")
    kolors("--repeat", "a.png", "-o", "b.png", model=None)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# NaN and black
# ---------------------------------------------------------------------------------------------------------------------

STAGES = [
    ("text_encoder", "layers.0.norm1.weight", torch.nan, "text encoding (the GLM)"),
    ("text_encoder", "layers.1.ffn.down.weight", torch.inf, "text encoding (the GLM)"),  # reaches the pooled one alone
    ("unet", "conv_in.weight", torch.nan, "step 0 of the denoising loop (the UNet)"),
    ("unet", "text_proj.weight", torch.nan, "step 0 of the denoising loop (the UNet)"),
    ("vae", "decoder.conv_in.weight", torch.nan, "decoding (the VAE)"),
    ("vae", "decoder.conv_out.bias", torch.inf, "decoding (the VAE)"),
]


@pytest.mark.parametrize(("part", "name", "value", "stage"), STAGES)
def test_the_stage_that_gives_nan_is_named(expect_refused, patched, small_pipe, part, name, value, stage):
    patched(part, name, lambda tensor: tensor.fill_(value))
    expect_refused("a cat", *SMALL, "--seed", "1", mentions=f"{stage} gave NaN or infinity")
    with pytest.raises(FloatingPointError, match=re.escape(stage)):
        small_pipe("a cat", height=64, width=64, num_inference_steps=1)


@pytest.mark.parametrize("strength", ["0", "1"])
def test_nan_from_the_vaes_encoder_is_named(expect_refused, patched, strength):
    """Neither the loop nor the decoder is blamed for it."""
    patched("vae", "encoder.conv_in.weight", lambda tensor: tensor.fill_(torch.nan))
    Image.effect_noise((64, 64), 60).save("start.png")
    mentions = "encoding the picture (the VAE) gave NaN"
    expect_refused("a cat", "--image", "start.png", "--strength", strength, "--seed", "1", mentions=mentions)


@pytest.mark.parametrize("value", [-50.0, -1.0, -0.998])
def test_an_all_black_picture_is_an_error(expect_refused, patched, value):
    """Also one that becomes black only by rounding to 256 values."""
    patched("vae", "decoder.conv_out.weight", torch.zeros_like)
    patched("vae", "decoder.conv_out.bias", lambda tensor: tensor.fill_(value))
    expect_refused("a cat", *SMALL, "--seed", "1", mentions="decoding (the VAE) gave an all-black picture")


def test_a_dark_picture_is_none(kolors, patched):
    patched("vae", "decoder.conv_out.weight", torch.zeros_like)
    patched("vae", "decoder.conv_out.bias", lambda tensor: tensor.fill_(-0.99))
    assert kolors("a cat", *SMALL, "-o", "a.png")[0] == 0
    assert pixels("a.png") == b"\x01" * (64 * 64 * 3)


# ---------------------------------------------------------------------------------------------------------------------
# As a program
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_saving(kolors, tmp_path, monkeypatch):
    def interrupted(image, target, **options):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert kolors("a cat", *SMALL, "--seed", "1") == (130, "", "kolors-ref: interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["a cat", "--steps", "x"], []])
def test_answers_without_loading_torch(tmp_path, arguments):
    code = f"""
import sys
from kolors_ref.cli import main
try:
    status = main({arguments!r})
except SystemExit as exit:
    status = exit.code
print("status", status, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert run.stdout.endswith(f"status {0 if '--help' in arguments else 2} False\n"), run.stderr
    assert ("usage: kolors-ref" in run.stdout) == ("--help" in arguments)


def test_progress_and_ctrl_c(small_checkpoint, tmp_path):
    """In a terminal: the bar shows step, seconds and sigma; Ctrl-C in the loop ends cleanly and leaves no file."""
    terminal, its_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "kolors_ref.cli", "a cat", "--model", str(small_checkpoint), *SMALL[:4]]
    command += ["--steps", "1000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & is deaf to Ctrl-C
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_side, env=ENVIRONMENT, cwd=tmp_path)
    signal.signal(signal.SIGINT, before)
    os.close(its_side)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while not re.search(rb"[1-9]\d*/1000 ", shown) and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        while more := os.read(terminal, 4096):
            shown += more
    except OSError:  # the terminal's other side is closed
        pass
    finally:
        process.kill()
        out = process.communicate()[0]
        os.close(terminal)
    assert out == b""
    assert re.search(rb"^seed \d+\r\n", shown)
    assert re.search(rb"\d+/1000 \[00:\d\d<[\d:?]+, .*(step/s|s/step), sigma=\d+\.\d+\]", shown), shown
    assert shown.endswith(b"kolors-ref: interrupted\r\n")
    assert b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this system does not leave huge pages to programs",
)
def test_large_tensors_are_in_huge_pages_unless_the_user_chose(tmp_path):
    def faults(**chosen):
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "THP_MEM_ALLOC_ENABLE"} | chosen
        command = [sys.executable, "-c", FAULTS]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        return int(run.stdout)

    assert faults() < faults(THP_MEM_ALLOC_ENABLE="0") / 2
