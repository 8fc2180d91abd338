"""Stages of another run that are the same in this one, taken over instead of done again: for ablations."""

import shutil
from pathlib import Path

from weights_conversion.files import read_json

from .recipe import Recipe
from .train import check_recipe
from .training_state import written

TOKENIZER = ("seed", "tokenizer_captions")
AUTOENCODER = ("seed", "vae", "vae_whole")
DENOISER = (*TOKENIZER, "glm", "bag_of_words", *AUTOENCODER, "scenes", "schedule", "dense_share", "unet")
DECIDED_BY = {
    "tokenizer.model": TOKENIZER,
    "glm.safetensors": (*TOKENIZER, "glm", "bag_of_words"),
    "vae.safetensors": ("seed", "vae"),
    "vae-whole.safetensors": AUTOENCODER,
    "vae-scale.json": AUTOENCODER,
    "vae-decoder.safetensors": (*AUTOENCODER, "vae_decoder"),
    "latents-[0-9]*.safetensors": (*AUTOENCODER, "scenes"),
    "latents-clean-[0-9]*.safetensors": (*AUTOENCODER, "clean_scenes"),
    "unet.safetensors": DENOISER,
    "unet-tuning.safetensors": (*DENOISER, "clean_scenes", "unet_tuning"),
}
"""The files of a run, and the fields of the recipe that decide what is in each."""


def reuse_stages(folder: Path, other: Path, recipe: Recipe) -> list[str]:
    """Copies to a run's folder the files that another run has and that would come out the same.

    Returns the names of the files copied; those that are there already are left alone.
    Raises FileNotFoundError if the other folder holds no run, and ValueError if ours holds one of another recipe.
    """
    if not (other / "recipe.json").is_file():
        raise FileNotFoundError(f"{other} holds no training run to take stages from: it has no recipe.json")
    check_recipe(folder, recipe)
    theirs = read_json(other / "recipe.json")
    ours = recipe.record()
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    for pattern, fields in DECIDED_BY.items():
        if all(ours[field] == theirs.get(field) for field in fields):
            for path in sorted(other.glob(pattern)):
                if not (folder / path.name).exists():
                    with written(folder / path.name) as beside:
                        shutil.copyfile(path, beside)
                    copied.append(path.name)
    return copied
