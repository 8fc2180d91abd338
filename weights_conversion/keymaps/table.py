"""The engine of the name tables: official name <-> our name. No tensor is ever transformed, only renamed.

A table is text in two columns, official and ours. `{i}`, `{j}` and `{k}` stand for the numbers of blocks and layers,
a `*` at the end for both `weight` and `bias`.
"""

import re
from collections.abc import Callable, Sequence

Row = tuple[str, str]


def rows(text: str, official: str = "", ours: str = "") -> list[Row]:
    """The rows of a table, each column put under a prefix: `x.*  y.*` under `a` and `b` gives (`a.x.*`, `b.y.*`)."""
    pairs = [line.split() for line in text.strip().splitlines()]
    return [(f"{official}.{left}".strip("."), f"{ours}.{right}".strip(".")) for left, right in pairs]


class KeyTable:
    """The names of one network's tensors.

    rows: the two columns; aliases: further official spellings, understood but never written; prefix: what may stand
    before every official name; unused: our names of tensors that files carry and the network does without.
    indices(config) says which numbers the placeholders take in a network of these sizes (our config): a prefix of our
    names -> tuples in the order of its placeholders. The longest prefix that fits a row counts.
    """

    def __init__(
        self,
        rows: list[Row],
        indices: Callable[[dict], dict[str, list[tuple[int, ...]]]],
        aliases: Sequence[Row] = (),
        prefix: str = "",
        unused: frozenset[str] = frozenset(),
    ) -> None:
        self.rows, self.indices, self.prefix, self.unused = rows, indices, prefix, unused
        self._forward = [(_pattern(official), _template(ours)) for official, ours in [*rows, *aliases]]
        self._backward = [(_pattern(ours), _template(official)) for official, ours in rows]

    def to_ours(self, official: str) -> str | None:
        """Our name for an official one; None if the table does not know it."""
        return _rename(official.removeprefix(self.prefix), self._forward)

    def to_official(self, ours: str) -> str | None:
        """The official name for one of ours; None if the table does not know it."""
        return _rename(ours, self._backward)

    def names(self, config: dict) -> set[str]:
        """Our name of every tensor that a network of these sizes (our config) has, the unused ones included."""
        indices = self.indices(config)
        found = set()
        for _, ours in self.rows:
            prefixes = [prefix for prefix in indices if f"{ours}.".startswith(f"{prefix}.")]
            letters = re.findall(r"{(\w)}", ours)
            for index in indices[max(prefixes, key=len)] if prefixes else [()]:
                numbered = _template(ours).format(**dict(zip(letters, index, strict=True)), p="{p}")
                found.update(numbered.format(p=p) for p in ("weight", "bias"))
        return found


def _template(column: str) -> str:
    return column.replace("*", "{p}")


def _pattern(column: str) -> re.Pattern[str]:
    """`down.{i}.skip.*` as a regular expression with a named group for each placeholder."""
    escaped = re.escape(_template(column)).replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>0|[1-9][0-9]*)", escaped))


def _rename(name: str, pairs: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in pairs:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None
