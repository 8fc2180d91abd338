"""How well a model does what prompts ask: its pictures, judged, in a table, as JSON and on a contact sheet."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..whole_files import written
from .judge import Verdict, judge
from .prompts import Prompt

THUMBNAIL = 96
"""Pixels along one side of a picture on the contact sheet."""
CELL, MARGIN = THUMBNAIL + 8, 130
"""Pixels from one picture of the contact sheet to the next, and those before the first of a row, for its label."""


@dataclass(frozen=True)
class Result:
    """A prompt, the picture that was drawn of it, and the judge's verdict."""

    prompt: Prompt
    image: Image.Image
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """The results of an evaluation, in the order of its prompts."""

    results: tuple[Result, ...]

    @property
    def categories(self) -> list[str]:
        """The categories of the prompts, in the order of their first."""
        return list(dict.fromkeys(result.prompt.category for result in self.results))

    @property
    def languages(self) -> list[str]:
        """The languages of the prompts, in the order of their first."""
        return list(dict.fromkeys(result.prompt.language for result in self.results))

    def select(self, category: str | None = None, language: str | None = None) -> list[Result]:
        """The results of a category and a language, or of all where None."""
        return [
            result
            for result in self.results
            if category in (None, result.prompt.category) and language in (None, result.prompt.language)
        ]

    def score(self, category: str | None = None, language: str | None = None) -> float:
        """The share, in [0, 1], of pictures for which the claim of their prompt holds; nan if there are none."""
        chosen = self.select(category, language)
        return sum(result.verdict.holds for result in chosen) / len(chosen) if chosen else float("nan")

    def table(self) -> str:
        """The scores in percent, categories down and languages across, as text to be printed."""
        columns = [*self.languages, None]
        lines = [f"{'category':<14}{'prompts':>8}" + "".join(f"{language or 'all':>8}" for language in columns)]
        for category in [*self.categories, None]:
            scores = "".join(f"{100 * self.score(category, language):>8.1f}" for language in columns)
            lines.append(f"{category or 'all':<14}{len(self.select(category)):>8}{scores}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Scores and single results, for JSON."""
        scores = {
            category or "all": {
                language or "all": self.score(category, language) for language in [*self.languages, None]
            }
            for category in [*self.categories, None]
        }
        results = [
            {
                "prompt": result.prompt.text,
                "language": result.prompt.language,
                "category": result.prompt.category,
                "claim": asdict(result.prompt.claim),
                "holds": result.verdict.holds,
                "reading": asdict(result.verdict.reading),
            }
            for result in self.results
        ]
        return {"scores": scores, "results": results}

    def contact_sheet(self) -> Image.Image:
        """All pictures, a row for each category and language, framed in green where the claim holds, else in red."""
        rows = [(category, language) for category in self.categories for language in self.languages]
        width = MARGIN + CELL * max(len(self.select(*row)) for row in rows)
        sheet = Image.new("RGB", (width, CELL * len(rows)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        for i, row in enumerate(rows):
            score = self.score(*row)
            draw.text((8, i * CELL + CELL // 2 - 14), f"{row[0]}, {row[1]}\n{score:.0%}", fill="black", font=font)
            for j, result in enumerate(self.select(*row)):
                x, y = MARGIN + j * CELL, i * CELL
                frame = (40, 150, 70) if result.verdict.holds else (215, 40, 40)
                draw.rectangle((x, y, x + CELL - 3, y + CELL - 3), fill=frame)
                sheet.paste(result.image.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), (x + 3, y + 3))
        return sheet

    def write_contact_sheet(self, path: Path) -> None:
        """Writes the contact sheet as PNG; OSError as with `written`."""
        with written(path) as beside:
            self.contact_sheet().save(beside, format="PNG")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a report as JSON that people can read; OSError as with `written`."""
    with written(path) as beside:
        beside.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def evaluate(
    draw: Callable[[Sequence[Prompt]], Sequence[Image.Image]], prompts: Sequence[Prompt], batch_size: int = 16
) -> Report:
    """Draws a picture of every prompt and judges it.

    `draw` takes up to `batch_size` prompts and gives as many pictures, in their order.
    Raises ValueError if there are no prompts, or if `draw` gives another number of pictures.
    """
    if not prompts:
        raise ValueError("there are no prompts to evaluate; mini_prompts() gives the benchmark's")
    results = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images = draw(batch)
        if len(images) != len(batch):
            raise ValueError(f"draw gave {len(images)} pictures of {len(batch)} prompts; it must give one of each")
        results += [
            Result(prompt, image, judge(image, prompt.claim)) for prompt, image in zip(batch, images, strict=True)
        ]
    return Report(tuple(results))
