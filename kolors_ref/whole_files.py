"""Files that are whole or not there at all: written under temporary names, and renamed once they are on the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unwritten(OSError):
    """A file cannot be written; the message says which, and why."""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write a file under, and renames it to `path` once it is whole and on the disk.

    Raises `Unwritten`, with nothing left behind, if the disk is full or the folder is gone.
    """
    beside = partial(path)
    try:
        yield beside
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Unwritten:  # of another file that was written meanwhile
        raise
    except OSError as error:
        raise Unwritten(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def partial(path: Path) -> Path:
    """The name that a file has until it is whole."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def remove_unfinished(folder: Path) -> None:
    """Removes the partial files of runs that were killed while writing."""
    for path in folder.glob(".*.partial-*"):
        if path.name.rpartition("-")[2].isdecimal():
            path.unlink()
