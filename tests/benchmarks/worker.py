"""One measurement, made in a process of its own so that its memory is its own; see compare.py.

    python -m tests.benchmarks.worker JOB FOLDER OUTPUT

JOB is a `Job` in JSON. Prints the figures as JSON; writes what was computed to OUTPUT, for the first round.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .contestants import load_picture, load_stage
from .jobs import STEPS, Job
from .machine import PeakMemory, synchronise


def measure_stage(job: Job, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Times a call after an identical one as warm-up; of the fp32 reference only the output counts."""
    call = load_stage(folder, job)
    if job.contestant != "float32":
        call(job.side)
    synchronise(job.device)
    start = time.perf_counter()
    output = call(job.side)
    synchronise(job.device)
    return {"seconds": time.perf_counter() - start}, output


def measure_picture(job: Job, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Times loading up to the first step and, if the picture has all its steps, a second whole picture."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        if name not in marks:
            synchronise(job.device)
            marks[name] = time.perf_counter()

    import_library(job)
    mark("start")
    call = load_picture(folder, job, mark)
    output = call()
    figures = {name: marks[name] - marks["start"] for name in ("ready", "first step")}
    if job.steps == STEPS:
        synchronise(job.device)
        start = time.perf_counter()
        call()
        synchronise(job.device)
        figures["seconds"] = time.perf_counter() - start
    return figures, output


def import_library(job: Job) -> None:
    """Imports what the job needs: seconds of importing are not seconds of loading."""
    if job.contestant == "ours":
        from kolors_ref import KolorsPipeline
    else:
        from diffusers import AutoencoderKL, KolorsPipeline, UNet2DConditionModel  # noqa: F401


@torch.no_grad()
def measure(job: Job, folder: Path) -> tuple[dict[str, float], Tensor]:
    """Runs a job; gives its figures (seconds, bytes) and its output."""
    if job.device == "cuda":
        torch.backends.cudnn.allow_tf32 = job.dtype != "float32"  # or fp32 would be no more exact than fp16
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as memory:
        figures, output = (measure_picture if job.part == "picture" else measure_stage)(job, folder)
    figures |= {"anonymous": memory.peaks["RssAnon"], "mapped": memory.peaks["RssFile"]}
    figures["resident"] = memory.peaks["VmHWM"]
    if job.device == "cuda":
        figures["vram"] = torch.cuda.max_memory_reserved()
    return asdict(job) | figures, output


def main(job: str, folder: str, output_file: str) -> None:
    """See the module."""
    figures, output = measure(Job(**json.loads(job)), Path(folder))
    if figures["round"] == 0:
        torch.save(output.cpu().clone(), output_file)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
