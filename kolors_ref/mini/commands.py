"""The miniature's commands: `kolors-ref train mini` and `kolors-ref evaluate`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from ..config import SDXL_SCHEDULE
from ..picture_file import check_writable
from ..pipeline import KolorsPipeline
from .caption_choice import CaptionReport, choices, choose
from .evaluation import Report, evaluate, write_report
from .processes import Processes, processes
from .prompts import PER_CATEGORY, Prompt, mini_prompts
from .recipe import Recipe
from .reuse import reuse_stages
from .train import check_shares, train_mini

T = TypeVar("T")

CAPTION_FILES, PICTURE_FILES = ("captions.json",), ("report.json", "sheet.png")
"""What an evaluation writes into its folder."""

ABLATIONS: dict[str, Callable[[Recipe], Recipe]] = {
    "bag-of-words": lambda recipe: replace(recipe, bag_of_words=True),
    "short-captions": lambda recipe: replace(recipe, dense_share=0.0),
    "dense-captions": lambda recipe: replace(recipe, dense_share=1.0),
    "sdxl-schedule": lambda recipe: replace(
        recipe, schedule=replace(recipe.schedule, num_train_timesteps=1000, beta_end=SDXL_SCHEDULE.beta_end)
    ),
    "no-tuning": lambda recipe: recipe.without("unet_tuning"),
    "no-reward": lambda recipe: recipe.without("unet_reward", "unet_reward_again"),
}
"""What can be left out or changed, to see what it was good for; everything else stays as it is."""


def run_training(options: argparse.Namespace) -> None:
    """Trains the miniature, or a variant of it, and prints where the checkpoint is."""
    if {"short-captions", "dense-captions"} <= set(options.ablate or []):
        raise ValueError("--ablate short-captions and dense-captions exclude each other; give one of them")
    recipe = replace(Recipe(), seed=options.seed).scaled(options.scale)
    if options.unet_steps:
        recipe = recipe.with_unet_steps(options.unet_steps)
    for name in options.ablate or []:
        recipe = ABLATIONS[name](recipe)
    if options.folder.exists() and not options.folder.is_dir():
        raise NotADirectoryError(f"the folder {options.folder} of the training is a file; give another with --folder")
    with processes(options.device) as here:
        check_shares(recipe, here)
        if options.reuse is not None:
            here.first_does(lambda: take_stages(options, recipe))
        model = train_mini(options.folder, recipe, here, options.previous)
        if here.first:
            print(model)


def take_stages(options: argparse.Namespace, recipe: Recipe) -> None:
    """Takes over what --reuse names, and says what that is."""
    taken = reuse_stages(options.folder, options.reuse, recipe)
    print(f"taken from {options.reuse}: {', '.join(taken) or 'nothing more'}", file=sys.stderr)


def run_evaluation(options: argparse.Namespace) -> None:
    """Measures a model by what it draws of MiniPrompts, or by the captions it chooses; prints and writes the scores."""
    with processes(options.device) as here:
        here.first_does(lambda: check_folder(options.output, CAPTION_FILES if options.captions else PICTURE_FILES))
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        pipe = KolorsPipeline.from_pretrained(options.model, dtype, here.device)
        report = (chosen_captions if options.captions else judged_pictures)(pipe, options, here)
    if here.first:
        print(report.table())
        options.output.mkdir(exist_ok=True)
        if options.captions:
            write_report(options.output / CAPTION_FILES[0], report.as_dict())
        else:
            write_report(options.output / PICTURE_FILES[0], report.as_dict())
            report.write_contact_sheet(options.output / PICTURE_FILES[1])


def judged_pictures(pipe: KolorsPipeline, options: argparse.Namespace, here: Processes) -> Report:
    """Draws the chosen prompts of MiniPrompts and judges the pictures; the first process alone gets the full report."""
    prompts = [prompt for prompt in mini_prompts(options.language) if is_chosen(prompt, options.limit)]
    mine = prompts[here.rank :: here.count]
    with tqdm(total=len(mine), unit="picture", disable=None if here.first else True) as bar:
        report = evaluate(drawing(pipe, options, bar), mine, options.batch_size) if mine else Report(())
    return Report(gathered(report.results, lambda result: result.prompt.number, here))


def chosen_captions(pipe: KolorsPipeline, options: argparse.Namespace, here: Processes) -> CaptionReport:
    """Has the UNet choose between captions; the first process alone gets the full report."""
    offered = [choice for choice in choices(options.limit) if options.language in (None, choice.language)]
    mine, results = offered[here.rank :: here.count], []
    with tqdm(total=len(mine), unit="choice", disable=None if here.first else True) as bar:
        for start in range(0, len(mine), options.batch_size):
            results += choose(pipe, mine[start : start + options.batch_size])
            bar.update(len(results) - bar.n)
    return CaptionReport(gathered(results, lambda result: result.choice.number, here))


def check_folder(folder: Path, names: Sequence[str]) -> None:
    """Raises OSError unless files of these names can be written into a folder; leaves nothing behind."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output {folder} is a file; give the name of a folder")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"the folder {folder.parent} of the output does not exist; create it first")
    new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OSError(f"the folder {folder} of the output cannot be written: {error.strerror}") from error
    try:
        for name in names:
            check_writable(folder / name)
    finally:
        if new:
            folder.rmdir()


def is_chosen(prompt: Prompt, limit: int) -> bool:
    """Whether a prompt is among the first `limit` of its category and language."""
    return prompt.number // 2 % PER_CATEGORY < limit


def drawing(
    pipe: KolorsPipeline, options: argparse.Namespace, bar: tqdm
) -> Callable[[Sequence[Prompt]], list[Image.Image]]:
    """Returns the function that draws prompts; the noise of each comes from the seed and its number alone."""

    def draw(prompts: Sequence[Prompt]) -> list[Image.Image]:
        """Draws a picture of each."""
        images = pipe(
            [prompt.text for prompt in prompts],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            sampler=options.sampler,
            generator=[torch.Generator().manual_seed(options.seed + prompt.number) for prompt in prompts],
        )
        bar.update(len(images))
        return images

    return draw


def gathered(results: Sequence[T], number: Callable[[T], int], here: Processes) -> tuple[T, ...]:
    """All processes' results, in the order of their numbers, in the first process; in any other only its own."""
    if here.count == 1:
        return tuple(results)
    parts: list[Sequence[T] | None] | None = [None] * here.count if here.first else None
    dist.gather_object(results, parts)
    if parts is None:
        return tuple(results)
    return tuple(sorted((result for part in parts for result in part), key=number))
