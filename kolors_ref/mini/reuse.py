"""Stages of another run that are the same in this one, taken over instead of done again: for ablations."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from weights_conversion import open_checkpoint
from weights_conversion.files import read_json, write_json

from ..loading import EMBEDDED, WEIGHTS
from ..whole_files import written
from .recipe import Recipe
from .train import note_recipe
from .training_state import write_tensors

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


def reuse_stages(folder: Path, other: str, recipe: Recipe) -> list[str]:
    """Copies to a run's folder the files that another run has and that would come out the same.

    Args:
        folder: of our run.
        other: the folder of the other; "mini" (not "./mini") stands for the embedded miniature, which has all but its
            UNet to give.
        recipe: of our run, which is noted in its folder first, so that no other recipe can go on with these files.

    Returns:
        The names of the files copied; those that are there already are left alone.

    Raises:
        FileNotFoundError: the other folder holds no run.
        ValueError: nothing would come out the same, or our folder holds a run of another recipe.
    """
    if other == EMBEDDED:
        with TemporaryDirectory() as run:
            lay_out_embedded(Path(run))
            return copy_stages(folder, Path(run), recipe, "the embedded miniature")
    if not (Path(other) / "recipe.json").is_file():
        raise FileNotFoundError(f"{other} holds no training run to take stages from: it has no recipe.json")
    return copy_stages(folder, Path(other), recipe, other)


def copy_stages(folder: Path, other: Path, recipe: Recipe, name: str) -> list[str]:
    """Copies from the folder of another run, which is called `name` in errors; see `reuse_stages`."""
    ours, theirs = recipe.record(), read_json(other / "recipe.json")
    same = [
        path
        for pattern, fields in DECIDED_BY.items()
        if all(ours[field] == theirs.get(field) for field in fields)
        for path in sorted(other.glob(pattern))
    ]
    if not same:
        raise ValueError(f"no stage of {name} is the same in this run; seed and scale must be the same")
    folder.mkdir(parents=True, exist_ok=True)
    note_recipe(folder, recipe)
    missing = [path for path in same if not (folder / path.name).exists()]
    for path in missing:
        with written(folder / path.name) as beside:
            shutil.copyfile(path, beside)
    return [path.name for path in missing]


def lay_out_embedded(folder: Path) -> None:
    """Writes the embedded miniature's tokenizer, language model and autoencoder as a run of the recipe has them."""
    networks = open_checkpoint(WEIGHTS).networks
    language_model, vae = (networks[name].tensors for name in ("text_encoder", "vae"))
    heads = ("final_norm.", "lm_head.")
    glm = {name if name.startswith(heads) else f"encoder.{name}": tensor for name, tensor in language_model.items()}
    stages = {
        "glm": {name: tensor for name, tensor in glm.items() if name != "encoder.rope.inv_freq"},
        "vae": (autoencoder := {f"vae.{name}": tensor for name, tensor in vae.items()}),
        "vae-whole": autoencoder,
        "vae-decoder": {name: vae[name] for name in vae if name.startswith(("post_quant_conv.", "decoder."))},
    }
    for name, tensors in stages.items():
        write_tensors(folder / f"{name}.safetensors", {key: tensor.float() for key, tensor in tensors.items()})
    shutil.copyfile(WEIGHTS / "tokenizer.model", folder / "tokenizer.model")
    write_json(folder / "vae-scale.json", {"scaling_factor": networks["vae"].config["scaling_factor"]})
    write_json(folder / "recipe.json", Recipe().record())
