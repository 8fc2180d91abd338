"""The engine of the config tables: the fields of an official config.json <-> the fields of our config dataclasses.

A missing field takes the default of the official class. A field that would change the mathematics in a way that is
not supported is an error that names it; so is a field the tables do not know, unless it is switched off (null, false).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COUNTS = ("num_layers", "layers", "layers_per_block", "transformer_depth")
MOST = 100
"""The most layers in a row, and levels, of a network; a text encoder of the official kind has 28."""
KINDS = {int: "a positive whole number", float: "a number", tuple: "a list of whole numbers"}


@dataclass(frozen=True)
class ConfigTable:
    """How the config of one network is translated.

    class_name: the official class. ours: our field -> its kind (int, float or tuple). defaults: what the official
    class takes for a missing field, where that is not the required value. copied: official field -> our field, the
    value being the same. required: official field -> the one value supported. ignored: official fields without
    effect on the output. The two functions translate the rest: `rest_to_ours(complete official config, where)` and
    `rest_to_official(our config)`.
    """

    class_name: str
    ours: dict[str, type]
    defaults: dict[str, Any]
    copied: dict[str, str]
    required: dict[str, Any]
    ignored: frozenset[str]
    rest_to_ours: Callable[[dict, str], dict]
    rest_to_official: Callable[[dict], dict]

    def to_ours(self, official: dict, where: str) -> dict[str, Any]:
        """Our config for an official one; `where` names the file in errors. Raises ValueError."""
        kind = official.get("_class_name", self.class_name)
        if kind != self.class_name:
            raise ValueError(f"{where}: _class_name is {kind!r}, and only {self.class_name!r} is supported.")
        for name, value in official.items():
            known = name in self.defaults or name in self.required or name in self.ignored or name.startswith("_")
            if not known and value is not None and value is not False:
                raise ValueError(f"{where}: the field {name} ({value!r}) is not known and could change the result.")
        config = {**self.defaults, **official}
        for name, wanted in self.required.items():
            value = config.get(name, wanted)
            entries = value if isinstance(value, list | tuple) and value else [value]  # some may be listed by level
            if any(entry != wanted for entry in entries):
                raise ValueError(f"{where}: {name} is {value!r}, and only {wanted!r} is supported.")
        copied = {ours: read(config, name, self.ours[ours], where) for name, ours in self.copied.items()}
        return checked_counts({**copied, **self.rest_to_ours(config, where)}, where)

    def to_official(self, ours: dict) -> dict[str, Any]:
        """The official config for one of ours."""
        copied = {name: ours[field] for name, field in self.copied.items()}
        return {**self.defaults, **self.required, **copied, **self.rest_to_official(ours)}

    def check_ours(self, config: Any, where: str) -> dict[str, Any]:
        """Our config as read from JSON, with tuples for lists; every field present, none unknown. Raises ValueError."""
        if not isinstance(config, dict) or set(config) != set(self.ours):
            odd = sorted(set(config) ^ set(self.ours)) if isinstance(config, dict) else [config]
            raise ValueError(f"{where}: these fields are missing or not known: {', '.join(map(str, odd))}.")
        checked = {field: read(config, field, kind, where) for field, kind in self.ours.items()}
        lengths = {field: len(value) for field, value in checked.items() if isinstance(value, tuple)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: {', '.join(lengths)} must have the same number of entries, one for each level.")
        return checked_counts(checked, where)


def checked_counts(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Our config, unless it asks for so many layers that their names alone would fill the memory: ValueError."""
    for field, value in config.items():
        entries = value if isinstance(value, tuple) else (value,)
        if len(entries) > MOST or (field in COUNTS and max(entries) > MOST):
            raise ValueError(f"{where}: {field} asks for more than {MOST} layers or levels.")
    return config


def read(config: dict, name: str, kind: type, where: str, length: int | None = None) -> Any:
    """A field of a config as an int, a finite float or a tuple of ints; ValueError where it is something else.

    `length` asks for that many entries, and repeats a single number as often: diffusers takes most numbers either as
    one for the network or as one for each level.
    """
    value = config.get(name)
    listed = isinstance(value, list | tuple)
    if kind is int and listed and len(value) > 0 and all(entry == value[0] for entry in value):
        value = value[0]
    elif kind is tuple and not listed and length is not None:
        value = [value] * length
    if kind is int:
        good = _is_int(value) and value > 0
    elif kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    else:
        good = isinstance(value, list | tuple) and len(value) > 0 and all(_is_int(v) and v >= 0 for v in value)
    if not good:
        raise ValueError(f"{where}: {name} is {value!r}, and {KINDS[kind]} is needed.")
    if length is not None and len(value) != length:
        raise ValueError(f"{where}: {name} has {len(value)} entries for {length} levels.")
    return tuple(value) if kind is tuple else value


def check_levels(config: dict, name: str, levels: int, where: str) -> None:
    """Raises ValueError unless a field is a list with one entry for each level."""
    if not isinstance(config[name], list | tuple) or len(config[name]) != levels:
        raise ValueError(
            f"{where}: {name} is {config[name]!r}, and a list with one entry for each of {levels} levels is needed."
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
