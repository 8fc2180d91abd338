"""What is fetched from the hub: the files of one variant, whole, and none twice; nothing here goes there."""

import sys
from pathlib import Path

import pytest

from kolors_ref import KolorsPipeline
from kolors_ref.hub import fetch

huggingface_hub = pytest.importorskip("huggingface_hub")

CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.model"] + [
    f"{name}/config.json" for name in ("text_encoder", "unet", "vae")
]
PLAIN = [
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
FP16 = [
    "text_encoder/model.safetensors.index.fp16.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]
SHARDS = ["text_encoder/pytorch_model.bin.index.json", "text_encoder/pytorch_model-00001-of-00001.bin"]
OTHER = ["README.md", "imgs/cat.png", "unet/diffusion_pytorch_model.onnx"]


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """fetched(files of a repository, variant) -> those of them that are weights or indices and arrive."""

    def run(files, variant):
        def snapshot_download(repository, allow_patterns=None, ignore_patterns=None):
            chosen = huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
            for file in chosen:
                (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
                (tmp_path / file).touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        folder = fetch("someone/Kolors", variant)
        arrived = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert not arrived & set(OTHER)
        assert arrived >= set(CONFIGS)
        return arrived - set(CONFIGS)

    return run


def test_a_variant_comes_with_its_shards(fetched):
    arrived = fetched(CONFIGS + PLAIN + FP16 + OTHER, "fp16")
    assert arrived == {*FP16, "text_encoder/model.safetensors.index.json"}


def test_without_a_variant_nothing_comes_twice(fetched):
    arrived = fetched(CONFIGS + PLAIN + FP16 + OTHER, None)
    assert arrived == {*PLAIN}


def test_what_there_is_in_fp16_alone_comes_without_asking(fetched):
    """As in the Kolors team's own repository, whose text encoder is in .bin files."""
    networks = [file for file in FP16 if not file.startswith("text_encoder")]
    assert fetched(CONFIGS + SHARDS + networks + OTHER, None) == {*SHARDS, *networks}


def test_one_network_in_fp16_alone(fetched):
    files = [file for file in PLAIN if not file.startswith("vae")] + FP16
    arrived = fetched(CONFIGS + files + OTHER, None)
    assert [file for file in arrived if file.endswith(".safetensors") and "fp16" in file] == [FP16[-1]]


def test_errors_of_the_hub_are_one_sentence(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("401 Client Error\nRequest ID: 1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"no folder someone/Kolors, and the hub .*: 401 Client Error$"):
        KolorsPipeline.from_pretrained("someone/Kolors")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"install kolors-ref\[hub\]"):
        KolorsPipeline.from_pretrained("someone/Kolors")


def test_an_existing_folder_is_not_asked_for(small_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(small_checkpoint.parent.parent)
    assert KolorsPipeline.from_pretrained(Path(small_checkpoint.parent.name) / small_checkpoint.name)
