"""Ours beside diffusers' on the same checkpoint, seed and dtype: times, memory, agreement, in Markdown.

    python -m tests.benchmarks.compare --folder DIR [--size small|full]

Writes random weights into DIR the first time (full: 18 GB), or takes the checkpoint that is there. Every measurement is
a process of its own; the contestants take turns. Results are kept in DIR-cpu.json or DIR-cuda.json after each, so an
interrupted run goes on where it stopped, and parts can be measured one after the other. Linux only.

Exit status 1: something failed, stages or pictures do not agree, or ours took too much memory; 2: wrong arguments,
or earlier results of another machine or code.
See docs/performance.md.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from weights_conversion import open_checkpoint

from . import flops, report
from .checkpoint import SIZES, write_adapter, write_checkpoint
from .contestants import adapter_folder
from .jobs import CONTESTANTS, PARTS, STEPS, Job, make_jobs
from .machine import ROOT, describe, drop_from_cache, limits

UNREAD = ("token_embed", "final_norm", "lm_head", "rope", "text_proj", "size_embed", "encoder", "quant_conv")
"""Weights that are looked up, used once a picture or used for other things: no part of what a timed call reads."""
TOKENIZER = Path(os.environ.get("KOLORS_TOKENIZER", ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"))


def check_list(text: str, allowed: tuple[str, ...]) -> list[str]:
    """A comma-separated argument, in the order of what is allowed."""
    values = text.split(",")
    if not set(values) <= set(allowed):
        raise argparse.ArgumentTypeError(f"choose among {', '.join(allowed)}")
    return [value for value in allowed if value in values]


def check_sides(text: str) -> list[int]:
    """Comma-separated sides of pictures."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) > 0 and int(value) % 32 == 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of multiples of 32, such as 512,1024")
    return [int(value) for value in values]


def check_count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.benchmarks.compare", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="of the checkpoint; outside the repository")
    add("--size", choices=list(SIZES), default="small", help="of the networks: small ones only try the benchmark")
    add("--sides", type=check_sides, help="of the pictures, default 512,1024; with small networks 128")
    add("--dtype", choices=list(report.BOUNDS), default="bfloat16", help="to compute in")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--rounds", type=check_count, default=3, help="measurements of each kind; the median counts")
    add("--only", type=partial(check_list, allowed=PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    contestants = partial(check_list, allowed=CONTESTANTS)
    default = list(CONTESTANTS[:3])
    add(
        "--contestants", type=contestants, default=default, help=f"some of {','.join(CONTESTANTS)}, the last by request"
    )
    add("--ip-adapter", action="store_true", help="with an IP-Adapter (random weights) and one reference picture")
    add("--compile", action="store_true", help="compile ours, and diffusers at its best")
    add(
        "--offload",
        choices=["none", "model", "stream"],
        default="none",
        help="for pictures on a GPU: ours, and diffusers at its best",
    )
    add("--picture-steps", type=check_count, help="of a whole picture; unless 25, its time is added up from the stages")
    add("--tokenizer", type=Path, default=TOKENIZER, help="Kolors' tokenizer.model, to write a checkpoint")
    add("--again", action="store_true", help="measure anew what has been measured")
    add("-o", "--output", type=Path, help="a file for the tables")
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with what depends on other options filled in."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    args.folder = args.folder.resolve()
    if not sys.platform.startswith("linux"):
        parser.error("the benchmark reads /proc and runs on Linux only")
    if args.folder.is_relative_to(ROOT):
        parser.error(f"--folder is {args.folder}, inside the repository; choose a place outside")
    if args.output is not None and not args.output.resolve().parent.is_dir():
        parser.error(f"--output is {args.output}, in a folder that does not exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch finds no GPU here")
    if args.offload != "none" and args.device != "cuda":
        parser.error(f"--offload is {args.offload}, and --device is cpu; offloading is measured on a GPU")
    args.sides = args.sides or ([128] if args.size == "small" else [512, 1024])
    slow = args.size == "full" and args.device == "cpu"
    args.picture_steps = args.picture_steps or (2 if slow else STEPS)
    try:
        write_checkpoint(args.folder, args.tokenizer, args.size)
        if args.ip_adapter:
            write_adapter(adapter_folder(args.folder), args.size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """The results on the disk: one file for the figures, one folder for what was computed."""

    file: Path
    machine: dict[str, str | int]
    figures: dict[str, dict]
    limits: dict[str, dict[str, float]]

    @property
    def outputs(self) -> Path:
        """The folder of what was computed."""
        return self.file.with_suffix(".outputs")

    @classmethod
    def read(cls, file: Path, machine: dict[str, str | int]) -> "Store":
        """Earlier results of the same machine, libraries and code; none if there is no file. Raises ValueError."""
        if not file.exists():
            return cls(file, machine, {}, {})
        content = json.loads(file.read_text())
        if content["machine"] != machine:
            raise ValueError(f"{file} was measured with {content['machine']}, and this is {machine}; remove it first.")
        return cls(file, machine, content["figures"], content["limits"])

    def write(self) -> None:
        """Saves the figures."""
        content = {"machine": self.machine, "limits": self.limits, "figures": self.figures}
        write_whole(self.file, json.dumps(content, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Writes a file, which never stands half-written under its name."""
    partial_file = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial_file.write_text(text)
        partial_file.replace(file)
    finally:
        partial_file.unlink(missing_ok=True)


def run(job: Job, folder: Path, output: Path) -> dict:
    """Measures in a new process; a failure is a result as well."""
    partial_output = output.with_name(f".{output.name}.partial-{os.getpid()}")
    command = [sys.executable, "-m", "tests.benchmarks.worker", json.dumps(asdict(job)), str(folder)]
    try:
        done = subprocess.run([*command, str(partial_output)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            if partial_output.exists():
                partial_output.replace(output)
            return json.loads(done.stdout.splitlines()[-1])
    finally:
        partial_output.unlink(missing_ok=True)
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}"}
    return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}


def run_all(jobs: list[Job], folder: Path, store: Store, again: bool) -> None:
    """Measures what is missing, saving after each job; pictures start from a disk, not from a cache."""
    store.outputs.mkdir(exist_ok=True)
    for number, job in enumerate(jobs, 1):
        if not again and job.key in store.figures and "failed" not in store.figures[job.key]:
            continue
        print(f"{number}/{len(jobs)} {job.key} ...", end=" ", flush=True)
        if job.part == "picture":
            drop_from_cache(folder)
            drop_from_cache(adapter_folder(folder))
        store.figures[job.key] = run(job, folder, store.outputs / f"{job.key}.pt")
        print(store.figures[job.key].get("failed", "done"), flush=True)
        store.write()


def weight_bytes(folder: Path, dtype: str) -> dict[str, int]:
    """Bytes of the weights that a call of each of our stages reads, once each, in the dtype computed in."""
    networks, found = open_checkpoint(folder).networks, {}
    for part, name in (("text", "text_encoder"), ("unet", "unet"), ("vae", "vae")):
        tensors = networks[name].tensors
        used = sum(tensors[key].numel() for key in tensors if not key.startswith(UNREAD) and ".cross_attn." not in key)
        used += sum(tensors[key].numel() for key in tensors if re.search(r"cross_attn\.(q|out)\.", key))
        found[part] = used * getattr(torch, dtype).itemsize
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------------


def options_of(args: argparse.Namespace) -> tuple[str, str, bool, bool, int, str]:
    """What all jobs have in common, in the order of `make_jobs`."""
    return args.dtype, args.device, args.ip_adapter, args.compile, args.picture_steps, args.offload


def render(args: argparse.Namespace, store: Store, jobs: list[Job]) -> tuple[str, list[str]]:
    """The tables, and what is wrong."""
    counted = {}
    rows = make_jobs(args.only, ["ours"], args.sides, 1, *options_of(args))
    stages = [job for job in rows if job.part != "picture"]
    pictures = [job for job in rows if job.part == "picture"]
    for job in stages:
        side = job.side or args.sides[0]
        if (side, job.ip_adapter) not in counted:
            counted[side, job.ip_adapter] = flops.both(args.size, side, job.ip_adapter)
        counted[job.side, job.ip_adapter] = counted[side, job.ip_adapter]
    rates, bytes_read = store.limits[args.dtype], weight_bytes(args.folder, args.dtype)
    results = report.Results(store.figures, store.outputs, counted, rates, bytes_read)
    best = "channels-last UNet and VAE" + (", compiled with torch.compile as ours is" if args.compile else "")
    best += "" if args.offload == "none" else f"; pictures of ours and of its best with offload {args.offload}"
    sections = [
        ", ".join(f"{name} {value}" for name, value in store.machine.items()),
        f"{args.size} networks, {args.dtype} on {args.device}, medians of up to {args.rounds}; diffusers at its best:"
        f" {best}; a picture's folder is read from the disk.",
        f"Matrix product {rates['flops'] / 1e9:.0f} GFLOP/s in {args.dtype}, copy {rates['bytes'] / 1e9:.1f} GB/s.",
    ]
    if stages:
        sections.append(report.stage_table(results, stages, args.compile))
    if pictures:
        sections.append(report.picture_table(results, pictures, args.compile))
    judged = args.size == "small" or args.dtype == "float32"
    said, apart = report.agreement(results, pictures, args.compile, judged)
    stored = open_checkpoint(args.folder).networks["unet"].tensors["conv_in.weight"].dtype
    in_place = stored == getattr(torch, args.dtype)
    return "\n\n".join([*sections, *said]) + "\n", apart + report.problems(results, jobs, in_place)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing, prints the tables; gives the exit status."""
    args = parse_arguments(arguments)
    try:
        store = Store.read(args.folder.with_name(f"{args.folder.name}-{args.device}.json"), describe(args.device))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    jobs = make_jobs(args.only, args.contestants, args.sides, args.rounds, *options_of(args))
    if args.dtype not in store.limits or args.again:
        store.limits[args.dtype] = limits(args.dtype, args.device)
    run_all(jobs, args.folder, store, args.again)
    text, problems = render(args, store, jobs)
    print("\n" + text)
    if args.output is not None:
        write_whole(args.output, text)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that unfinished files are removed
    sys.exit(main())
