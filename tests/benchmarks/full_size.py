"""Kolors at its full size with random weights: ours beside diffusers in agreement, seconds and memory, in one table.

    python tests/benchmarks/full_size.py --folder /somewhere/kolors-random

Writes a checkpoint of about 18 GB into that folder the first time, then makes every measurement in a process of its
own. Results are kept beside the folder, so that an interrupted run goes on where it stopped. See README.md.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from full_size_checkpoint import write_checkpoint
from full_size_worker import Job

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("full_size_worker.py")
TOKENIZER = ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"
ALLOWANCE = 3 * 10**9
"""Bytes of memory that ours may need beyond its weights."""

OURS = {"text": ["text_packed", "text_padded"], "unet": ["unet_packed", "unet_padded"], "vae": ["vae_ours"]}
TITLES = {
    "text_packed": "ours",
    "text_padded": "ours, 256 tokens",
    "text_reference": "ours, layer by layer",
    "unet_packed": "ours",
    "unet_padded": "ours, 256 keys",
    "vae_ours": "ours",
}
STAGES = {"text": "text encoding", "unet": "UNet step", "vae": "VAE decode"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = lambda *allowed: lambda text: check_list(text.split(","), allowed)
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint; outside the repository")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="Kolors' tokenizer.model")
    parser.add_argument("--stages", type=listed("text", "unet", "vae"), default=["text", "unet", "vae"])
    parser.add_argument("--sizes", type=listed(), help="sides of the picture, default 512,1024")
    parser.add_argument("--library", type=listed("ours", "diffusers"), default=["ours", "diffusers"])
    parser.add_argument("--dtype", type=listed("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--steps", type=int, default=1, help="calls to time; their median is reported")
    parser.add_argument("--json", type=Path, help="file of the results, default FOLDER.json")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the benchmark itself")
    args = parser.parse_args(arguments)
    args.folder = args.folder.resolve()
    if args.folder.is_relative_to(ROOT):
        parser.error(f"--folder is {args.folder}, inside the repository; choose a place outside")
    args.json = (args.json or args.folder.with_name(f"{args.folder.name}.json")).resolve()
    sizes = args.sizes or (["64"] if args.tiny else ["512", "1024"])
    if not all(size.isdecimal() and int(size) > 0 and int(size) % 32 == 0 for size in sizes):
        parser.error(f"--sizes is {','.join(sizes)}; multiples of 32 are needed")
    args.sizes = [int(size) for size in sizes]
    try:
        write_checkpoint(args.folder, args.tokenizer, args.tiny)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def check_list(values: list[str], allowed: tuple[str, ...]) -> list[str]:
    """A comma-separated argument."""
    if allowed and not set(values) <= set(allowed):
        raise argparse.ArgumentTypeError(f"choose among {', '.join(allowed)}")
    return values


def jobs(stages: list[str], sizes: list[int], libraries: list[str], dtypes: list[str]) -> list[Job]:
    """What to measure, in order."""
    found = []
    for stage in stages:
        for size in [None] if stage == "text" else sizes:
            for dtype in dtypes:
                if stage == "text" and dtype == "float32":
                    runs = ["text_reference"] if "ours" in libraries else []
                else:
                    runs = (OURS[stage] if "ours" in libraries else []) + (
                        [f"{stage}_diffusers"] if "diffusers" in libraries else []
                    )
                found += [Job(run, dtype, size) for run in runs]
    return found


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(": ")[2] if cpu else "unknown",
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def read_results(file: Path) -> dict[str, dict]:
    """Earlier results of the same machine and the same libraries; none if there is no file. Raises ValueError."""
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if content["machine"] != machine():
        raise ValueError(
            f"{file} was measured with {content['machine']}, and this is {machine()}; name another --json."
        )
    return content["results"]


def run(job: Job, folder: Path, steps: int, output: Path) -> dict:
    """Measures in a new process; a failure is a result as well."""
    arguments = [json.dumps(job.__dict__), str(folder), str(steps), str(output)]
    done = subprocess.run([sys.executable, str(WORKER), *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = done.stderr.strip().splitlines()[-1] if done.returncode > 0 else f"killed by signal {-done.returncode}"
    return {**job.__dict__, "failed": reason}


def compare(results: dict[str, dict], outputs: Path) -> None:
    """Adds to every result its distance from diffusers' in the same format, and from float32."""
    for figures in results.values():
        stage = figures["run"].split("_")[0]
        same = Job(f"{stage}_diffusers", figures["dtype"], figures["size"])
        exact = [Job(run, "float32", figures["size"]) for run in (f"{stage}_diffusers", f"{stage}_reference")]
        for name, others in (("from_diffusers", [same]), ("from_float32", exact)):
            other = next((job.key for job in others if "seconds" in results.get(job.key, {})), None)
            if other and "seconds" in figures:
                mine = torch.load(outputs / f"{Job(figures['run'], figures['dtype'], figures['size']).key}.pt")
                figures[name] = relative_error(mine, torch.load(outputs / f"{other}.pt"))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| over everything."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def table(results: dict[str, dict]) -> str:
    """Everything measured, in Markdown; "faster" and "leaner" say how many times as much diffusers takes."""
    columns = ["stage", "type", "run", "load s", "s", "CPU s", "faster", "weights GB", "needed GB"]
    columns += ["beyond weights", "leaner", "peak GB", "anonymous", "mapped", "from diffusers", "from float32"]
    rows = [columns, ["---"] * 3 + ["--:"] * (len(columns) - 3)]
    for figures in results.values():
        theirs = Job(f"{figures['run'].split('_')[0]}_diffusers", figures["dtype"], figures["size"])
        rows.append(row(figures, results.get(theirs.key, {})))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(figures: dict, theirs: dict) -> list[str]:
    """One measurement as cells of the table; theirs is diffusers' of the same, or empty."""
    stage, _, run = figures["run"].partition("_")
    size = f" {figures['size']}²" if figures["size"] else ""
    cells = [STAGES[stage] + size, figures["dtype"], TITLES.get(figures["run"], run)]
    if "failed" in figures:
        return [*cells, figures["failed"]]
    figures = {**figures, "beyond": figures["needed"] - figures["weights"]}
    seconds = lambda name: f"{figures[name]:.2f}"
    gigabytes = lambda name: f"{figures[name] / 1e9:.2f}"
    factor = lambda name: f"{theirs[name] / figures[name]:.2f}" if name in theirs else ""
    error = lambda name: f"{figures[name]:.1e}" if name in figures else ""
    cells += [seconds("load_seconds"), seconds("seconds"), seconds("cpu_seconds"), factor("seconds")]
    cells += [gigabytes("weights"), gigabytes("needed"), gigabytes("beyond"), factor("needed")]
    cells += [gigabytes("resident"), gigabytes("anonymous"), gigabytes("mapped")]
    return [*cells, error("from_diffusers"), error("from_float32")]


def verdict(results: dict[str, dict]) -> list[str]:
    """What went wrong: a run that failed, or one of ours that took too much memory."""
    problems = []
    for key, figures in results.items():
        if "failed" in figures:
            problems.append(f"{key} failed: {figures['failed']}")
        elif "diffusers" not in figures["run"] and figures["needed"] > figures["weights"] + ALLOWANCE:
            beyond = (figures["needed"] - figures["weights"]) / 1e9
            problems.append(
                f"{key} needed {beyond:.2f} GB beyond its weights, and {ALLOWANCE / 1e9:.0f} GB are allowed"
            )
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing, prints the table; exit status 1 if something went wrong."""
    args = parse_arguments(arguments)
    try:
        results = read_results(args.json)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    outputs = args.json.with_suffix(".outputs")
    outputs.mkdir(exist_ok=True)
    wanted = jobs(args.stages, args.sizes, args.library, args.dtype)
    for number, job in enumerate(wanted, 1):
        if not args.again and "seconds" in results.get(job.key, {}):
            continue
        print(f"{number}/{len(wanted)} {job.key} ...", end=" ", flush=True)
        results[job.key] = run(job, args.folder, args.steps, outputs / f"{job.key}.pt")
        print(f"{results[job.key].get('seconds', float('nan')):.2f} s", flush=True)
        compare(results, outputs)
        unfinished = args.json.with_suffix(".partial")
        unfinished.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
        unfinished.replace(args.json)
    everything = jobs(list(STAGES), args.sizes, ["ours", "diffusers"], ["bfloat16", "float32"])
    shown = {job.key: results[job.key] for job in everything if job.key in results}
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine().items()) + "\n\n" + table(shown))
    problems = verdict(shown)
    print("\n".join(["", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
