"""Whole pictures with LoRAs against diffusers' pipeline: three namings, two at once, fused and unfused."""

import numpy as np
import pytest
import torch
from diffusers import KolorsPipeline
from parity.oracle import small_pipeline
from parity.test_lora_files import kohya, older, trained
from parity.test_pipeline import assert_same_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

from kolors_ref import KolorsPipeline as Ours
from kolors_ref.cli import main

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1"]
ARGUMENTS = {
    "prompt": "一只猫 on a boat",
    "negative_prompt": "ugly",
    "height": 64,
    "width": 72,
    "num_inference_steps": 8,
    "guidance_scale": 5.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint and two LoRAs for it, as PEFT names; the first under the two other namings as well."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = small_pipeline()
    pipeline.save_pretrained(folder / "model")
    for name, rank, seed in (("first", 4, 10), ("second", 2, 20)):
        (folder / name).mkdir()
        path = trained(pipeline.unet, folder / name, name, seed, r=rank, lora_alpha=rank, target_modules=TARGETS)
        path.rename(folder / f"{name}.safetensors")
        pipeline.unet.delete_adapters(name)
    state = load_file(folder / "first.safetensors")
    save_file({older(name): tensor for name, tensor in state.items()}, folder / "older.safetensors")
    save_file(kohya(state), folder / "kohya.safetensors")
    return folder


@pytest.fixture
def oracle(folder):
    """diffusers' pipeline, without LoRAs."""
    pipeline = KolorsPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **arguments):
    """A picture as an array in 0 ... 255."""
    generator = torch.Generator().manual_seed(7)
    found = pipeline(**ARGUMENTS, generator=generator, output_type="np", **arguments)
    return (found if isinstance(found, np.ndarray) else found.images) * 255


@pytest.mark.parametrize("naming", ["first", "older", "kohya"])
def test_namings(folder, oracle, naming):
    """A file of each naming changes the picture as it changes diffusers', and not at all once unloaded.

    So strong an update makes the UNet sensitive: 1e-7 more of the first noise moves diffusers' own picture by 0.2, of
    255. From one in fp64 ours is 0.02 apart and diffusers' 0.14.
    """
    ours = Ours.from_pretrained(folder / "model")
    before = draw(ours)
    oracle.load_lora_weights(folder / f"{naming}.safetensors")
    name = ours.load_lora(folder / f"{naming}.safetensors")
    changed = draw(ours)
    assert_same_pictures(changed, draw(oracle), tolerance=0.5)
    assert np.abs(changed - before).max() > 10
    ours.unload_lora(name)
    np.testing.assert_array_equal(draw(ours), before)


def test_two_at_once_fused_and_unfused(folder, oracle):
    """Two with weights of their own; fused pictures are the same, and unfusing restores every bit."""
    ours = Ours.from_pretrained(folder / "model")
    before = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    for name, scale in (("first", 0.7), ("second", -0.4)):
        oracle.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
        ours.load_lora(folder / f"{name}.safetensors", scale)
    oracle.set_adapters(["first", "second"], [0.7, -0.4])
    theirs = draw(oracle)
    apart = draw(ours)
    assert_same_pictures(apart, theirs)
    ours.fuse_lora()
    assert_same_pictures(draw(ours), theirs)
    ours.unfuse_lora()
    np.testing.assert_array_equal(draw(ours), apart)
    ours.unload_lora()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.unet.state_dict().items())


def test_command_line_and_repeat(folder, oracle, tmp_path):
    """--lora FILE:SCALE, and --repeat, which refuses another file under the same name."""
    oracle.load_lora_weights(folder / "first.safetensors", adapter_name="first")
    oracle.set_adapters(["first"], [0.5])
    lora = tmp_path / "style.safetensors"
    lora.write_bytes((folder / "first.safetensors").read_bytes())
    status = main([
        ARGUMENTS["prompt"], "--model", str(folder / "model"), "--negative-prompt", "ugly", "--height", "64", "--width",
        "72", "--steps", "8", "--guidance-scale", "5", "--seed", "7", "--lora", f"{lora}:0.5", "-o",
        str(tmp_path / "a.png"),
    ])  # fmt: skip
    assert status == 0
    ours = np.array(Image.open(tmp_path / "a.png"))
    assert_same_pictures(ours.astype(float), draw(oracle)[0].round(), tolerance=1)  # of whole numbers
    assert main(["--repeat", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "b.png")), ours)
    lora.write_bytes((folder / "second.safetensors").read_bytes())
    assert main(["--repeat", str(tmp_path / "a.png"), "-o", str(tmp_path / "c.png")]) == 2
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("lora", ["missing.safetensors", "style.safetensors:often", "style.safetensors:nan"])
def test_command_line_mistakes(folder, tmp_path, capsys, lora):
    """A missing file, a scale that is no number."""
    status = main(["a boat", "--model", str(folder / "model"), "--lora", lora, "-o", str(tmp_path / "a.png")])
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kolors-ref: error: ")
    assert not (tmp_path / "a.png").exists()
