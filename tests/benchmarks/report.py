"""From results to tables and a verdict."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from .flops import Stages
from .jobs import COMPILED, STEPS, Job

STAGE_OF = {"text": "text", "image": "image", "unet": "step", "vae": "decode"}
TITLES = {
    "text": "text encoding, a prompt of 25 tokens and the empty one",
    "image": "image encoding, one reference picture",
    "unet": "UNet, guided step",
    "vae": "VAE, decoding",
}
BOUNDS = {"float32": (1, 0.05), "float16": (8, 1.0), "bfloat16": (48, 6.0)}
"""How far two pictures may be apart, in 1/255: at most anywhere, and as a root mean square.

In fp32 the arithmetic is the same but for its order. In fp16 and bf16 every library rounds in other places; the bound
allows for that, and is far below what unrelated pictures of random weights differ by.
"""
STAGE_BOUNDS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Allowed relative error of our stage's output against diffusers', for fp32 or without an fp32 reference."""
FURTHER = 1.5
"""How many times diffusers' error against fp32 that of our stage's output may be."""
ALLOWANCE = 3 * 10**9
"""Bytes of anonymous memory that ours may take for a picture of at most 512 x 512 on a CPU, weights being mapped."""


@dataclass(frozen=True)
class Difference:
    """Between two pictures, in 1/255."""

    largest: float
    root_mean_square: float

    def exceeds(self, dtype: str) -> bool:
        """Whether it is more than computing in that dtype explains."""
        largest, root_mean_square = BOUNDS[dtype]
        # Written so that NaN exceeds.
        return not (self.largest <= largest and self.root_mean_square <= root_mean_square)


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compares pictures (N, H, W, 3) in [0, 1] before they are rounded; pictures of other sizes differ infinitely."""
    if a.shape != b.shape:
        return Difference(float("inf"), float("inf"))
    apart = (a.double() - b.double()).abs() * 255
    return Difference(apart.max().item(), apart.square().mean().sqrt().item())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| over everything."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@dataclass(frozen=True)
class Results:
    """What has been measured.

    Attributes:
        figures: by the job's key; a failed job has "failed" alone.
        outputs: the folder of what was computed in the first round.
        flops: by side and whether with an IP-Adapter, then "ours" and "diffusers".
        limits: FLOP/s and bytes/s of the machine.
        weight_bytes: what our stages read of the checkpoint at each call, in the dtype computed in.
    """

    figures: dict[str, dict]
    outputs: Path
    flops: dict[tuple[int, bool], dict[str, Stages]]
    limits: dict[str, float]
    weight_bytes: dict[str, int]

    def median(self, job: Job, figure: str) -> float | None:
        """The median over the rounds measured; None without any."""
        found = []
        while (measured := self.figures.get(replace(job, round=len(found)).key)) and figure in measured:
            found.append(measured[figure])
        return median(found) if found else None

    def output(self, job: Job) -> torch.Tensor | None:
        """What a job computed in its first round."""
        file = self.outputs / f"{replace(job, round=0).key}.pt"
        measured = self.figures.get(replace(job, round=0).key, {"failed": "never run"})
        return torch.load(file) if file.exists() and "failed" not in measured else None


def as_contestant(job: Job, contestant: str, compiled: bool = False) -> Job:
    """The same job of another contestant."""
    dtype = "float32" if contestant == "float32" else job.dtype
    offload = "none" if contestant == "diffusers" else job.offload
    return replace(
        job, contestant=contestant, dtype=dtype, compiled=compiled and contestant in COMPILED, offload=offload
    )


def lines(cells: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; the first row is its head, the first column its names."""
    head, *rows = [list(row) for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["--:"] * (len(head) - 1), *rows])


def name_of(job: Job) -> str:
    """A row's name."""
    size = f" {job.side}²" if job.side else ""
    return TITLES[job.part] + size + (", IP-Adapter" if job.ip_adapter and job.part == "unet" else "")


def ratio(theirs: float | None, ours: float | None) -> str:
    """How many times as long theirs takes."""
    return f"{theirs / ours:.2f}" if theirs and ours else ""


def seconds_cells(show_seconds: bool, *seconds: float | None) -> list[str]:
    """Seconds of ours, diffusers and its best, on a GPU; then both ratios."""
    shown = [f"{value:.3f}" if value else "" for value in seconds] if show_seconds else []
    return [*shown, ratio(seconds[1], seconds[0]), ratio(seconds[2], seconds[0])]


def head(job: Job, name: str) -> list[str]:
    """The head of a table of times."""
    shown = ["ours, s", "diffusers, s", "at its best, s"] if job.device == "cuda" else []
    return [name, *shown, "diffusers / ours", "at its best / ours"]


def stage_table(results: Results, jobs: list[Job], compiled: bool) -> str:
    """Times, shares of the machine's limits and errors of the stages; jobs are those of ours, one a row."""
    shares = ["ours, share of the matrix rate", "diffusers, share", "ours, weights' share of the bandwidth"]
    rows = [[*head(jobs[0], "stage"), *shares, "ours from diffusers", "ours from fp32", "diffusers from fp32"]]
    for job in jobs:
        ours, theirs, best = stage_seconds(results, job, compiled)
        if ours is None and theirs is None:
            continue
        stage, counted = STAGE_OF[job.part], results.flops[job.side, job.ip_adapter]
        rate = lambda whose, seconds, stage=stage, counted=counted: (
            f"{sum(counted[whose][stage].values()) / seconds / results.limits['flops']:.0%}" if seconds else ""
        )
        read = results.weight_bytes.get(job.part)
        band = f"{read / ours / results.limits['bytes']:.0%}" if ours and read else ""
        cells = seconds_cells(job.device == "cuda", ours, theirs, best)
        apart = ["" if error is None else f"{error:.1e}" for error in errors(results, job)]
        rows.append([name_of(job), *cells, rate("ours", ours), rate("diffusers", theirs), band, *apart])
    return lines(rows)


def stage_seconds(results: Results, job: Job, compiled: bool) -> list[float | None]:
    """Median seconds of ours, diffusers and its best, which is the same where it has nothing to change."""
    others = [as_contestant(job, "diffusers"), as_contestant(job, "best", compiled)]
    ours, theirs, best = (results.median(one, "seconds") for one in (job, *others))
    return [ours, theirs, theirs if job.part in ("text", "image") else best]


def errors(results: Results, job: Job) -> list[float | None]:
    """Relative errors of the output: ours from diffusers, ours and diffusers from fp32; None without one of them."""
    mine, theirs, exact = map(results.output, (job, as_contestant(job, "diffusers"), as_contestant(job, "float32")))
    pairs = ((mine, theirs), (mine, exact), (theirs, exact))
    return [None if a is None or b is None else relative_error(a, b) for a, b in pairs]


def too_far(results: Results, job: Job) -> list[str]:
    """What is wrong with the output of a stage of ours."""
    apart, mine, theirs = errors(results, job)
    if mine is not None and theirs is not None and job.dtype != "float32":
        if mine <= FURTHER * theirs:  # written so that NaN is wrong
            return []
        return [f"{job.key} is {mine:.1e} from fp32 and diffusers' {theirs:.1e}; {FURTHER} times that are allowed"]
    if apart is None or apart <= STAGE_BOUNDS[job.dtype]:
        return []
    return [f"{job.key} is {apart:.1e} from diffusers; {STAGE_BOUNDS[job.dtype]:.0e} are allowed"]


def picture_table(results: Results, jobs: list[Job], compiled: bool) -> str:
    """Whole pictures: loading, the first step, all steps; and the memory."""
    rows = [head(jobs[0], "whole picture")]
    memory = [["peak of the process, GB", "ours", "diffusers", "at its best"]]
    for job in jobs:
        sides = f"{job.side}²" + (", IP-Adapter" if job.ip_adapter else "")
        all_three = [as_contestant(job, name, compiled) for name in ("ours", "diffusers", "best")]
        for figure, title in (("ready", "folder to ready"), ("first step", "folder to first step")):
            times = [results.median(one, figure) for one in all_three]
            rows.append([f"{title}, {sides}", *seconds_cells(job.device == "cuda", *times)])
        times = [results.median(one, "seconds") for one in all_three]
        how = "measured"
        if job.steps != STEPS:
            how = "added up from the stages"
            times = [composed(results, one) for one in all_three]
        rows.append([f"picture, {STEPS} steps, {sides} ({how})", *seconds_cells(job.device == "cuda", *times)])
        for figure, title in (("anonymous", "anonymous memory"), ("resident", "resident memory"), ("vram", "VRAM")):
            peaks = [results.median(one, figure) for one in all_three]
            if any(peaks):
                memory.append([f"{title}, {sides}", *(f"{peak / 1e9:.2f}" if peak else "" for peak in peaks)])
    return lines(rows) + "\n\n" + lines(memory)


def composed(results: Results, picture: Job) -> float | None:
    """Seconds of a whole picture as the sum of its stages; None where one of them is missing.

    What ours prepares for a picture is left out: less than a thousandth of the arithmetic (see docs/performance.md).
    """
    total = 0.0
    for part in ("text", "image", "unet", "vae"):
        if part == "image" and not picture.ip_adapter:
            continue
        with_ip = picture.ip_adapter and part in ("image", "unet")
        side = 0 if part in ("text", "image") else picture.side
        job = replace(picture, part=part, side=side, steps=0, ip_adapter=with_ip, offload="none")
        if part in ("text", "image") and picture.contestant == "best":
            job = as_contestant(job, "diffusers")
        seconds = results.median(job, "seconds")
        if seconds is None:
            return None
        total += seconds * (STEPS if part == "unet" else 1)
    return total


def agreement(results: Results, jobs: list[Job], compiled: bool, judged: bool = True) -> tuple[list[str], list[str]]:
    """How far our pictures are from diffusers' and diffusers' from each other; and, if judged, what is wrong with that.

    Those of full networks of random weights in half precision cannot be judged: the UNet enlarges every rounding.
    """
    said, problems = [], []
    for job in jobs:
        pictures = {name: results.output(as_contestant(job, name, compiled)) for name in ("ours", "diffusers", "best")}
        for a, b in (("ours", "diffusers"), ("best", "diffusers")):
            if pictures[a] is None or pictures[b] is None:
                continue
            found = difference(pictures[a], pictures[b])
            largest, root = BOUNDS[job.dtype]
            text = (
                f"{a} and {b} at {job.side}², {job.steps} steps: pictures differ by at most {found.largest:.2f}/255,"
                f" root mean square {found.root_mean_square:.3f}/255"
                + (f" (bounds in {job.dtype}: {largest} and {root})" if judged else " (not judged)")
            )
            said.append(text)
            if judged and a == "ours" and found.exceeds(job.dtype):
                problems.append(f"the pictures do not agree: {text}")
    return said, problems


def problems(results: Results, jobs: list[Job], weights_in_place: bool) -> list[str]:
    """Runs that failed, outputs of our stages that are wrong, and pictures of ours that took too much memory."""
    found = []
    for job in jobs:
        figures = results.figures.get(job.key, {})
        if "failed" in figures:
            found.append(f"{job.key} failed: {figures['failed']}")
        elif job.part != "picture" and job.contestant == "ours" and job.round == 0:
            found += too_far(results, job)
        limited = job.part == "picture" and job.contestant == "ours" and job.device == "cpu" and job.side <= 512
        if limited and weights_in_place and figures.get("anonymous", 0) > ALLOWANCE:
            taken, allowed = figures["anonymous"] / 1e9, ALLOWANCE / 1e9
            found.append(f"{job.key} took {taken:.2f} GB of anonymous memory; {allowed:.0f} GB are allowed")
    return found
