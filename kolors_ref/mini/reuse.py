"""Stages of another run that are the same in this one, taken over instead of done again: for ablations."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from ..picture_file import partial
from .recipe import Recipe

TOKENIZER = ("seed", "tokenizer_captions")
AUTOENCODER = ("seed", "vae", "vae_whole")
DECIDED_BY = {
    "tokenizer.model": TOKENIZER,
    "glm.safetensors": (*TOKENIZER, "glm", "bag_of_words"),
    "vae.safetensors": ("seed", "vae"),
    "vae-whole.safetensors": AUTOENCODER,
    "vae-scale.json": AUTOENCODER,
    "latents-[0-9]*.safetensors": (*AUTOENCODER, "scenes"),
    "latents-clean-[0-9]*.safetensors": (*AUTOENCODER, "clean_scenes"),
}
"""The files of a run up to the UNet, and the fields of the recipe that decide what is in each."""


def reuse_stages(folder: Path, other: Path, recipe: Recipe) -> list[str]:
    """Copies to a run's folder the files that another run has and that would come out the same.

    Returns the names of the files copied; those that are there already are left alone.
    Raises FileNotFoundError if the other folder holds no run.
    """
    if not (other / "recipe.json").is_file():
        raise FileNotFoundError(f"{other} holds no training run to take stages from: it has no recipe.json")
    theirs = json.loads((other / "recipe.json").read_text(encoding="utf8"))
    ours = json.loads(json.dumps(asdict(recipe)))
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    for pattern, fields in DECIDED_BY.items():
        if all(ours[field] == theirs.get(field) for field in fields):
            for path in sorted(other.glob(pattern)):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, partial(folder / path.name))
                    os.replace(partial(folder / path.name), folder / path.name)
                    copied.append(path.name)
    return copied
