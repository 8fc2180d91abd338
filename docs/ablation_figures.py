"""Draws the figures of ablations (docs/mini.md) from finished runs: curves of the loss, and pictures side by side.

    pip install matplotlib
    python docs/ablation_figures.py "the recipe=runs/all" "bag of words=runs/bag-of-words" ... --output docs/images

Each run's folder holds what `kolors-ref train mini --folder RUN` wrote, and in RUN/evaluation what
`kolors-ref evaluate --model RUN/model --output RUN/evaluation` did, without and with `--captions`. The tables of scores
are printed as Markdown.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kolors_ref.mini.evaluation import CELL, MARGIN

COLUMNS = 3
"""Pictures shown of each row of a contact sheet."""
SMOOTHING = 4
"""Points of a curve that are averaged, if it has as many."""


def draw_curves(runs: dict[str, Path]) -> plt.Figure:
    """Draws the loss of the UNet's first phase over its steps, one line for each run."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, folder in runs.items():
        points = [json.loads(line) for line in (folder / "unet.jsonl").read_text(encoding="utf8").splitlines()]
        window = np.full(count := min(SMOOTHING, len(points)), 1 / count)
        steps, losses = (np.convolve([point[key] for point in points], window, "valid") for key in ("step", "loss"))
        axes.plot(steps, losses, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def draw_sheet(runs: dict[str, Path]) -> Image.Image:
    """Puts the first pictures of every category and language from the runs' contact sheets side by side."""
    sheets = [Image.open(folder / "evaluation" / "sheet.png") for folder in runs.values()]
    block, head = COLUMNS * CELL, 24
    sheet = Image.new("RGB", (MARGIN + block * len(runs) + 16 * (len(runs) - 1), head + sheets[0].height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    first = scores(next(iter(runs.values())), "report.json")
    rows = [f"{category}, {language}" for category in first for language in first[category] if language != "all"]
    for i, row in enumerate(rows[: sheets[0].height // CELL]):
        draw.text((8, head + i * CELL + CELL // 2 - 6), row, "black", font)
    for j, (name, theirs) in enumerate(zip(runs, sheets, strict=True)):
        left = MARGIN + j * (block + 16)
        draw.text((left + 4, 6), name, "black", font)
        sheet.paste(theirs.crop((MARGIN, 0, MARGIN + block, theirs.height)), (left, head))
    return sheet.resize((sheet.width * 6 // 10, sheet.height * 6 // 10), Image.LANCZOS)


def scores(folder: Path, report: str) -> dict[str, dict[str, float]]:
    """The scores of a run's evaluation: shares by category or fact, and in it by language and of all."""
    return json.loads((folder / "evaluation" / report).read_text(encoding="utf8"))["scores"]


def table(runs: dict[str, Path], report: str) -> str:
    """The scores in percent, categories or facts down and runs across, as Markdown."""
    reports = [scores(folder, report) for folder in runs.values()]
    lines = ["| | " + " | ".join(runs) + " |", "|---" + "|--:" * len(runs) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{100 * r[name]['all']:.0f}" for r in reports) + " |" for name in reports[0]]
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, writes both pictures and prints the table."""
    parser = argparse.ArgumentParser(description="Draw the figures of the ablations in docs/mini.md.")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a finished run and what to call it")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    runs = {name: Path(folder) for name, _, folder in (run.partition("=") for run in options.runs)}
    draw_curves(runs).savefig(options.output / "ablation-curves.png", dpi=110)
    draw_sheet(runs).quantize(128).save(options.output / "ablation-pictures.png", optimize=True)
    print(table(runs, "report.json"), table(runs, "captions.json"), sep="\n\n")


if __name__ == "__main__":
    main()
