"""The machine: what it is, what it can do at most, and what a process takes of its memory."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

MATRIX_UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("kolors_ref", "weights_conversion", "tests/benchmarks")
"""The folders of the code that is measured, and that measures."""


def describe(device: str) -> dict[str, str | int]:
    """What the figures depend on."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in cpu.items()}
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    found = {
        "cpu": cpu.get("model name", "unknown"),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "matrix units": " ".join(unit for unit in MATRIX_UNITS if unit in flags) or "none",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
        "code": digest(ROOT),
    }
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {"gpu": f"{torch.cuda.get_device_name()}, {memory / 1e9:.0f} GB", "cuda": torch.version.cuda}
    return found


def digest(root: Path) -> str:
    """A fingerprint of the code, which changes whenever the code does."""
    found = hashlib.sha256()
    for file in sorted(file for folder in MEASURED for file in (root / folder).rglob("*.py")):
        found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def synchronise(device: str) -> None:
    """Waits for what has been started on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def shortest(call: Callable[[], object], device: str, times: int = 5) -> float:
    """Seconds of the fastest of several calls, a first one not counted."""
    seconds = []
    for _ in range(times + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def limits(dtype: str, device: str) -> dict[str, float]:
    """What the machine reaches at its best: FLOP/s of a square matrix product, bytes/s read and written in a copy."""
    reached = fastest(dtype, device)
    if device == "cuda":
        torch.cuda.empty_cache()  # this process lives on while others measure
    return reached


def fastest(dtype: str, device: str) -> dict[str, float]:
    """See `limits`; what it allocates is free afterwards, for this process alone."""
    kind = getattr(torch, dtype)
    side = MATRIX_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    source = torch.ones(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * side**3 / shortest(lambda: a @ b, device),
        "bytes": 2 * len(source) / shortest(lambda: target.copy_(source), device),
    }


class PeakMemory:
    """Watches this process's resident memory: anonymous, mapped from files, and both together (Linux)."""

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        self.peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.sample()

    def watch(self) -> None:
        """Samples every 10 ms; the kernel itself keeps the peak of the sum, VmHWM."""
        while not self.done.wait(0.01):
            self.sample()

    def sample(self) -> None:
        """Raises the peaks to the present values, in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peaks:
                self.peaks[name] = max(self.peaks[name], int(value.split()[0]) * 1024)


def drop_from_cache(folder: Path) -> None:
    """Lets the system forget the contents of a folder's files, so that the next reader gets them from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
