"""What the whole suite shares: a small checkpoint, and the options of pytest, which reads this file first."""

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small networks gain nothing from threads
pytest.register_assert_rewrite("parity.oracle")  # so that a failure says by how much


def pytest_addoption(parser):
    group = parser.getgroup("parity", "parity with the oracle on a checkpoint of your own")
    group.addoption("--checkpoint", metavar="DIR", help="a checkpoint that diffusers and kolors_ref can both load")
    group.addoption(
        "--dtype",
        default="float32",
        choices=["float64", "float32", "float16", "bfloat16"],
        help="the dtype to compare in (default: float32)",
    )
    group.addoption("--device", default="cpu", help="where to compute (default: cpu)")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """A checkpoint in diffusers' layout: small random networks and a real tokenizer; not to be changed."""
    from parity.oracle import glm_config, small_pipeline, unet_config

    sizes = {"channels": (16, 32, 32), "depth": (0, 1, 1), "layers_per_block": 1, "text_dim": 16, "pooled_dim": 16}
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    small_pipeline(glm=glm_config(num_layers=2, hidden_size=16), unet=unet_config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint_copy(small_checkpoint, tmp_path):
    """A copy of the small checkpoint to be changed, file by file: a changed one must be removed before it is written.

    Its files are links to the same content, so it costs no space.
    """
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture(scope="session")
def small_pipe(small_checkpoint):
    """The small checkpoint, loaded; not to be changed."""
    from kolors_ref import KolorsPipeline

    return KolorsPipeline.from_pretrained(small_checkpoint)
