"""Memory that tensors free on a CPU is kept for the next ones, in a process that has loaded a network."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource
import torch
from kolors_ref import KolorsPipeline
KolorsPipeline.from_pretrained("mini")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(5_000_000) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
"""Counts the page faults of five times 120 MB in six tensors, when that is done again."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's C library is not glibc")
def test_freed_memory_is_kept_unless_the_user_chose():
    def faults(**chosen):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        environment = {**environment, "PYTHONPATH": str(ROOT), **chosen}
        command = [sys.executable, "-c", FAULTS]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return int(run.stdout)

    assert faults() < faults(MALLOC_TRIM_THRESHOLD_="0") / 2
