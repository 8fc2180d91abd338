"""Conversion between the layouts, and its comparison: nothing lost, nothing half-written, nothing overwritten."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import KolorsPipeline
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from parity.oracle import TOKENIZER
from safetensors.torch import load_file

from weights_conversion import convert, differences, open_checkpoint
from weights_conversion.files import write_safetensors
from weights_conversion.keymaps import KEYMAPS

Usage = namedtuple("Usage", "total used free")
convert_module = sys.modules[convert.__module__]  # the package's attribute of that name is the function


def listing(folder):
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fixture", ["shared_diffusers", "shared_fp16", "shared_kolors", "shared_ours"])
def test_round_trip_through_ours_gives_the_same_bytes(request, shared_diffusers, tmp_path, fixture):
    """official -> ours -> official: files, names, numbers; whatever layout it began in."""
    source = request.getfixturevalue(fixture)
    convert(source, tmp_path / "ours", "kolors-ref")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers")
    for name in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        theirs, ours = (folder / f"{name}.safetensors" for folder in (shared_diffusers, tmp_path / "back"))
        assert ours.read_bytes() == theirs.read_bytes()
    first, second = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert list(differences(first, second)) == []
    assert second.scheduler == first.scheduler
    assert second.force_zeros_for_empty_prompt == first.force_zeros_for_empty_prompt
    assert second.tokenizer.read_bytes() == first.tokenizer.read_bytes()
    assert listing(tmp_path) == ["back", "ours"]


def test_configs_survive_the_round_trip(shared_diffusers, shared_ours, tmp_path):
    """Every field of the official config.json that bears on the result, with the same value."""
    convert(shared_ours, tmp_path / "back", "diffusers")
    for name, free in (("unet", set()), ("vae", {"sample_size"}), ("text_encoder", set())):
        theirs = json.loads((shared_diffusers / name / "config.json").read_text())
        ours = json.loads((tmp_path / "back" / name / "config.json").read_text())
        table = KEYMAPS[name].CONFIG
        assert table.to_ours(ours, "ours") == table.to_ours(theirs, "theirs")
        # Fields without effect are left out, and take the oracle's defaults again.
        different = {field for field in theirs if field[0] != "_" and field in ours and ours[field] != theirs[field]}
        assert different <= free
        assert len(ours) > len(table.ours)


def test_diffusers_opens_what_is_written(pipeline, tmp_path):
    """from_pretrained gives the same networks, tokenizer and schedule as the original pipeline."""
    components = pipeline.components | {"tokenizer": ChatGLMTokenizer(str(TOKENIZER))}
    original = KolorsPipeline(**components, force_zeros_for_empty_prompt=True)
    original.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers")
    opened = KolorsPipeline.from_pretrained(tmp_path / "back")
    for name in ("text_encoder", "unet", "vae"):
        expected, state = getattr(original, name).state_dict(), getattr(opened, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].to(state[key].dtype)) for key in expected)
    assert opened.text_encoder.dtype == original.text_encoder.dtype
    configs = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (opened, original)]
    assert configs[0] == configs[1]
    assert opened.config.force_zeros_for_empty_prompt is True
    texts = ["a cat", "一只猫 [gMASK]"]
    both = [
        tokenizer(texts, padding="max_length", max_length=16) for tokenizer in (opened.tokenizer, original.tokenizer)
    ]
    assert dict(both[0]) == dict(both[1])
    saved, written = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("original", "back"))
    assert {k: v for k, v in written.items() if k[0:2] != "_d"} == {k: v for k, v in saved.items() if k[0:2] != "_d"}


def test_diffusers_passes_over_the_guidance_scale(shared_ours, tmp_path):
    """The entry that it does not know is not even warned of."""
    copy = Path(shutil.copytree(shared_ours, tmp_path / "ours"))
    index = json.loads((copy / "kolors-ref.json").read_text())
    index["pipeline"]["guidance_scale"] = 1.5
    (copy / "kolors-ref.json").write_text(json.dumps(index))
    convert(copy, tmp_path / "written", "diffusers")
    written = json.loads((tmp_path / "written" / "model_index.json").read_text())
    assert written["_guidance_scale"] == 1.5
    _, unknown, _ = KolorsPipeline.extract_init_dict(written)
    assert "_guidance_scale" not in unknown


def test_the_text_encoder_is_sharded_as_transformers_does(shared_ours, pipeline, tmp_path, monkeypatch):
    """Shards of at most the limit, an index, and transformers reads them."""
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 12_000)
    convert(shared_ours, tmp_path / "back", "diffusers")
    folder = tmp_path / "back" / "text_encoder"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == set(shards)
    assert all(sum(t.nbytes for t in load_file(folder / shard).values()) <= 12_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in pipeline.text_encoder.state_dict().values())
    reopened = type(pipeline.text_encoder).from_pretrained(folder)
    assert all(torch.equal(v, pipeline.text_encoder.state_dict()[k]) for k, v in reopened.state_dict().items())
    assert list(differences(open_checkpoint(shared_ours), open_checkpoint(tmp_path / "back"))) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", ["kolors-ref", "diffusers"])
def test_casting(shared_kolors, pipeline, tmp_path, dtype, to):
    """Every floating-point tensor, the rotation frequencies included."""
    convert(shared_kolors, tmp_path / "cast", to, dtype=dtype)
    networks = open_checkpoint(tmp_path / "cast").networks
    assert {d for network in networks.values() for d in network.dtypes.values()} == {dtype}
    assert torch.equal(networks["unet"].tensors["conv_in.weight"], pipeline.unet.conv_in.weight.to(dtype))
    inv_freq = pipeline.text_encoder.rotary_pos_emb.inv_freq
    assert torch.equal(networks["text_encoder"].tensors["rope.inv_freq"], inv_freq.to(dtype))


def test_a_format_that_is_too_narrow(diffusers_folder, edit_weights, tmp_path):
    """Infinities would be found only when the checkpoint is used."""
    path = diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit_weights(path, lambda tensors: tensors["conv_in.bias"].fill_(1e5))
    with pytest.raises(ValueError, match=r"The tensor 'conv_in.bias' holds .* beyond 65504, the most of float16"):
        convert(diffusers_folder, tmp_path / "narrow", dtype=torch.float16)
    assert not list(tmp_path.glob("*narrow*"))
    convert(diffusers_folder, tmp_path / "wide", dtype=torch.bfloat16)


def test_files_without_the_unused_tensors(diffusers_folder, edit_weights, tmp_path):
    """Some text encoders come without an output head; they convert as they are."""
    path = diffusers_folder / "text_encoder" / "model.safetensors"
    edit_weights(path, lambda tensors: [tensors.pop(n) for n in ("output_layer.weight", "rotary_pos_emb.inv_freq")])
    convert(diffusers_folder, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").networks["text_encoder"].unused == ["final_norm.weight"]


def expect_failure(error, source, destination, *parts, **options):
    """Conversion fails with one line that holds the parts, and leaves nothing new beside the destination."""
    before = listing(Path(destination).parent) if Path(destination).parent.is_dir() else None
    with pytest.raises(error) as caught:
        convert(source, destination, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    if before is not None:
        assert listing(Path(destination).parent) == before


def test_what_stands_there_is_not_overwritten(shared_diffusers, ours_folder, tmp_path):
    """A checkpoint only with force; anything else never."""
    marker = ours_folder / "scheduler"  # of the other layout, and so gone when this one is written anew
    marker.touch()
    expect_failure(FileExistsError, shared_diffusers, ours_folder, "ours exists already", "--force")
    assert marker.exists()
    convert(shared_diffusers, ours_folder, force=True)
    assert not marker.exists()
    assert len(open_checkpoint(ours_folder).networks) == 3
    assert listing(tmp_path) == ["ours"]
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "cat.png").touch()
    expect_failure(FileExistsError, shared_diffusers, tmp_path / "photographs", "not a checkpoint", force=True)
    expect_failure(
        FileExistsError, shared_diffusers, tmp_path / "photographs" / "cat.png", "not a checkpoint", force=True
    )
    assert (tmp_path / "photographs" / "cat.png").exists()


def test_what_is_not_of_a_checkpoint_is_not_deleted(shared_diffusers, ours_folder):
    (ours_folder / "my-lora.safetensors").write_bytes(b"days of work")
    with pytest.raises(FileExistsError, match=r"holds my-lora.safetensors too, which --force would delete"):
        convert(shared_diffusers, ours_folder, force=True)
    assert (ours_folder / "my-lora.safetensors").read_bytes() == b"days of work"


def test_the_source_is_safe(diffusers_folder, tmp_path):
    """Not the source itself, nothing inside it, nothing around it, not through a link."""
    (tmp_path / "link").symlink_to(diffusers_folder)
    (tmp_path / "model_index.json").touch()
    for destination in (diffusers_folder, tmp_path / "link", diffusers_folder / "ours", tmp_path / "link" / "x"):
        expect_failure(ValueError, diffusers_folder, destination, "is the source or lies inside it", force=True)
    expect_failure(ValueError, diffusers_folder, tmp_path, "contains the source", force=True)
    assert len(open_checkpoint(diffusers_folder).networks) == 3


def test_a_destination_without_a_parent(shared_diffusers, tmp_path):
    """The folder around it must exist."""
    expect_failure(FileNotFoundError, shared_diffusers, tmp_path / "a" / "b", "does not exist", "create it first")
    (tmp_path / "file").touch()
    expect_failure(FileNotFoundError, shared_diffusers, tmp_path / "file" / "b", "is not a folder")


def test_the_disk_is_looked_at_first(shared_diffusers, tmp_path, monkeypatch):
    """Too little space is said before anything is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(convert_module, "write_safetensors", lambda *_: pytest.fail("wrote before checking"))
    expect_failure(OSError, shared_diffusers, tmp_path / "ours", "0.00 GB free", "GB are needed")


def test_what_appeared_meanwhile_is_not_replaced(shared_diffusers, tmp_path, monkeypatch):
    """A folder of the destination's name, made while the weights were being written."""

    def slow(path, tensors, dtype, on_bytes):
        (tmp_path / "ours").mkdir(exist_ok=True)
        (tmp_path / "ours" / "thesis.txt").write_text("years of work")
        write_safetensors(path, tensors, dtype, on_bytes)

    monkeypatch.setattr(convert_module, "write_safetensors", slow)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(shared_diffusers, tmp_path / "ours")
    assert (tmp_path / "ours" / "thesis.txt").read_text() == "years of work"
    assert listing(tmp_path) == ["ours"]


@pytest.mark.parametrize(
    "name",
    [
        "unet/checkpoints/model.safetensors",
        "unet/finetune.safetensors",
        "unet/modelling.safetensors.zip",
        "unet/train.py",
        "unet/results.json",
        "vae/NOTES.md",
    ],
)
def test_what_is_no_part_of_a_checkpoint_is_not_replaced(shared_diffusers, diffusers_folder, name):
    """In the folders of its networks neither."""
    file = diffusers_folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    named = name if name.count("/") == 1 else "unet/checkpoints"
    expect_failure(FileExistsError, shared_diffusers, diffusers_folder, f"holds {named} too", force=True)
    assert file.read_text() == "precious"


def test_incomplete_checkpoints(unet_file, diffusers_folder, edit_weights, tmp_path):
    """All that lacks is named."""
    expect_failure(ValueError, unet_file, tmp_path / "ours", "text_encoder, vae, scheduler, tokenizer")
    (diffusers_folder / "tokenizer" / "tokenizer.model").unlink()
    expect_failure(ValueError, diffusers_folder, tmp_path / "ours", "lacks tokenizer")
    path = diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors"
    edit_weights(path, lambda tensors: tensors.pop("quant_conv.bias"))
    expect_failure(ValueError, diffusers_folder, tmp_path / "ours", "lacks 1 of its tensors", "'quant_conv.bias'")


def test_layouts_and_formats_that_cannot_be_written(shared_diffusers, tmp_path):
    """The message says which can."""
    expect_failure(ValueError, shared_diffusers, tmp_path / "x", "kolors-ref and diffusers", to="kolors")
    expect_failure(ValueError, shared_diffusers, tmp_path / "x", "torch.int8", dtype=torch.int8)
    expect_failure(ValueError, shared_diffusers, tmp_path / "x", "float8_e4m3fn", dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("to", ["kolors-ref", "diffusers"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interruption_leaves_nothing(shared_kolors, ours_folder, tmp_path, monkeypatch, to, error):
    """Neither a partial folder nor damage to what stood at the destination."""

    def interrupted(path, tensors, dtype, on_bytes):
        if path.parent.name == "vae" or path.name == "vae.safetensors":
            path.write_bytes(b"half a file")
            raise error("stopped")
        write_safetensors(path, tensors, dtype, on_bytes)

    monkeypatch.setattr(convert_module, "write_safetensors", interrupted)
    with pytest.raises(error):
        convert(shared_kolors, tmp_path / "new", to)
    with pytest.raises(error):
        convert(shared_kolors, ours_folder, to, force=True)
    assert listing(tmp_path) == ["ours"]
    assert len(open_checkpoint(ours_folder).networks) == 3


def test_a_failed_rename_puts_the_old_one_back(shared_diffusers, ours_folder, tmp_path, monkeypatch):
    """With force the old checkpoint is moved aside before the new one takes its name."""
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".ours.partial") and "replaced" not in self.name:
            raise PermissionError(f"{target} cannot be written")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    expect_failure(PermissionError, shared_diffusers, ours_folder, "cannot be written", force=True)
    assert len(open_checkpoint(ours_folder).networks) == 3


def test_no_difference_between_layouts(shared_diffusers, shared_fp16, shared_kolors, shared_ours):
    """Shards, names and file formats do not matter."""
    for path in (shared_fp16, shared_kolors, shared_ours):
        assert list(differences(open_checkpoint(shared_diffusers), open_checkpoint(path))) == []


def test_one_bit_is_a_difference(shared_diffusers, ours_folder, edit_weights):
    """A flipped bit, another NaN, a zero with a sign: bytes count, not numbers."""

    def flip(tensors):
        tensors["conv_in.bias"].view(torch.int32)[3] ^= 1

    edit_weights(ours_folder / "unet.safetensors", flip)
    found = list(differences(open_checkpoint(shared_diffusers), open_checkpoint(ours_folder)))
    assert found == ["unet: conv_in.bias holds other numbers"]


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda t: t.pop("lm_head.weight"), "text_encoder: lm_head.weight is only in the first"),
        (
            lambda t: t.update({"final_norm.weight": t["final_norm.weight"].float()}),
            "float16 in the first and torch.float32",
        ),
        (lambda t: t.update({"final_norm.weight": torch.zeros(3)}), "shape (32,) in the first and (3,) in the second"),
    ],
)
def test_differences_are_named(shared_ours, ours_folder, edit_weights, function, sentence):
    """Missing tensors, dtypes, shapes."""
    edit_weights(ours_folder / "text_encoder.safetensors", function)
    (found,) = differences(open_checkpoint(shared_ours), open_checkpoint(ours_folder))
    assert sentence in found


def test_sizes_and_networks_count_too(shared_ours, ours_folder, unet_file, edit_json):
    """The same tensors do something else under another config; a UNet file has no config to compare."""
    index = ours_folder / "kolors-ref.json"
    vae = json.loads(index.read_text())["vae"]
    edit_json(index, vae=vae | {"scaling_factor": 0.18215})
    found = list(differences(open_checkpoint(shared_ours), open_checkpoint(ours_folder)))
    assert found == ["vae: scaling_factor is 0.13025 in the first and 0.18215 in the second"]
    found = list(differences(open_checkpoint(unet_file), open_checkpoint(shared_ours)))
    assert [sentence.split(":")[0] for sentence in found] == ["text_encoder", "vae"]
