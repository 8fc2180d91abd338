"""PNG files that remember how their picture was made."""

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .whole_files import partial, written

KEY = "kolors-ref"
"""The name of the PNG text chunk that holds the parameters, as JSON."""


def check_png(path: Path) -> None:
    """Raises ValueError unless the name is that of a PNG file."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the output {path} must end in .png, the format that keeps the parameters")


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be written at path; leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(f"the output {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of the output does not exist; create it first")
    try:
        partial(path).touch()
        partial(path).unlink()
    except OSError as error:
        raise OSError(f"the output {path} cannot be written: {error.strerror}") from error


def save_picture(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Writes a picture and its parameters, whole or not at all; raises what `written` does."""
    text = PngImagePlugin.PngInfo()
    # A file name that is not UTF-8 reaches Python with lone surrogates, which backslashes turn into JSON's own escapes.
    text.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False).encode(errors="backslashreplace").decode())
    with written(path) as beside:
        image.save(beside, format="PNG", pnginfo=text)


def read_parameters(path: Path) -> dict[str, Any]:
    """Returns the parameters that a picture was made with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a PNG file, or not one written by `save_picture`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path} to repeat")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            text = image.info.get(KEY)
        parameters = None if text is None else json.loads(text)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise ValueError(f"{path} cannot be read as a picture made by kolors-ref") from error
    if text is None:
        raise ValueError(f"{path} holds no parameters; only pictures made by kolors-ref can be repeated")
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} holds parameters that are not understood")
    return parameters


def content_hash(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
