"""Checkpoints from the Hugging Face hub, for which the extra `hub` is needed."""

from pathlib import Path

from weights_conversion.files import find_weights
from weights_conversion.keymaps import KEYMAPS

PLAIN = ("*.json", "*.model", "*.bin")
"""Files without a variant: configs, the tokenizer, and weights of the Kolors team's own text encoder."""


def fetch(repository: str, variant: str | None) -> Path:
    """Returns the folder of a repository's checkpoint, downloading the files of one variant unless they are cached.

    Args:
        repository: its id, "owner/name".
        variant: such as "fp16"; None for the plain files, or for a network without any, its fp16 ones.

    Raises:
        FileNotFoundError: huggingface_hub is not installed, or could not get the files.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {repository}; to fetch a hub repository of that name, install kolors-ref[hub]"
        ) from None
    get = lambda **patterns: Path(huggingface_hub.snapshot_download(repository, **patterns))
    try:
        if variant:  # a shard is called model.fp16-00001-of-00003.safetensors
            return get(allow_patterns=[*PLAIN, f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"])
        folder = get(allow_patterns=[*PLAIN, "*.safetensors"], ignore_patterns=["*.fp16.*", "*.fp16-*"])
        lacking = [name for name in KEYMAPS if (folder / name).is_dir() and not find_weights(folder / name, None)]
        return get(allow_patterns=[*PLAIN, *(f"{name}/*.safetensors" for name in lacking)]) if lacking else folder
    except Exception as error:  # the library raises its own and its transport's kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"there is no folder {repository}, and the hub did not give it: {reason}") from error
