"""Checkpoints of a training run: whole or not there at all, checked when read, the last two kept."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..whole_files import written

KEPT = 2
"""Checkpoints of a stage that are kept: the last, and one to fall back on."""


@dataclass(frozen=True)
class TrainingState:
    """Tensors by name after some steps of a stage, and the settings of that stage as JSON."""

    step: int
    settings: str
    tensors: dict[str, Tensor]


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file with a digest of its tensors; OSError as with `written`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {**(facts or {}), "sha256": digest(tensors)})
    with written(path) as beside:
        beside.write_bytes(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `write_tensors` wrote: tensors by name, and facts.

    Raises FileNotFoundError if there is no file, and ValueError if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if facts.pop("sha256", None) != digest(tensors):
        raise ValueError(f"{path} is damaged: its content is not what was written")
    return tensors, facts


def read_result(path: Path) -> dict[str, Tensor]:
    """Reads the tensors that a finished piece of the work gave; raises what `read_tensors` does."""
    try:
        return read_tensors(path)[0]
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and the next run makes it again") from error


def digest(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of names and numbers."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def state_files(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage in a folder, the oldest first."""
    pattern = re.compile(rf"{re.escape(stage)}-\d{{8}}\.safetensors")
    return sorted(path for path in folder.glob(f"{stage}-*.safetensors") if pattern.fullmatch(path.name))


def save_state(folder: Path, stage: str, state: TrainingState) -> None:
    """Writes a checkpoint, then removes all but the last two."""
    facts = {"step": str(state.step), "settings": state.settings}
    write_tensors(folder / f"{stage}-{state.step:08d}.safetensors", state.tensors, facts)
    for old in state_files(folder, stage)[:-KEPT]:
        old.unlink()


def load_state(folder: Path, stage: str, settings: str, previous: bool = False) -> TrainingState | None:
    """Reads the last checkpoint of a stage, or with `previous` the last but one; None if there is none.

    Raises ValueError if it is damaged, was made with other settings, or is the only one and `previous` is set.
    """
    files = state_files(folder, stage)
    if not files:
        return None
    if previous and len(files) == 1:
        raise ValueError(f"there is no checkpoint before {files[0]}; remove this one to start the stage again")
    path = files[-2 if previous else -1]
    step = int(path.stem.removeprefix(f"{stage}-"))
    try:
        tensors, facts = read_tensors(path)
        if facts.get("step") != str(step):  # the digest is of the tensors alone
            raise ValueError(f"{path} is damaged: it is not of step {step}")
    except ValueError as error:
        alone = previous or len(files) == 1
        advice = "remove it to go on without it" if alone else "--previous goes back to the checkpoint before it"
        raise ValueError(f"{error}; {advice}") from error
    if facts.get("settings") != settings:
        raise ValueError(f"{path} was made with other settings; train in another folder, or with the same")
    return TrainingState(step, settings, tensors)
