"""What the parity tests on a whole checkpoint share: the options, the checkpoint, and the table of errors."""

from pathlib import Path

import pytest
import torch
from parity.oracle import small_pipeline

ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def checkpoint(request, tmp_path_factory):
    """The folder given as --checkpoint; without it a small random one, written by diffusers."""
    folder = request.config.getoption("--checkpoint")
    if folder is not None:
        return Path(folder)
    folder = tmp_path_factory.mktemp("checkpoint")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def table(request):
    """Rows (what, error, tolerance) that the run ends with."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if rows:
        where = config.getoption("--checkpoint") or "a small random checkpoint"
        terminalreporter.section(f"{where} in {config.getoption('--dtype')} on {config.getoption('--device')}")
    for what, error, tolerance in rows:
        terminalreporter.write_line(f"{what:<45} {error:9.2e}   at most {tolerance:7.1e}")
