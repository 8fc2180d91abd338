"""Who may import whom: a file of a network can be read alone, and the oracles stay in the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLES = {"diffusers", "transformers", "peft", "accelerate"}
LAYERS = (
    {"kolors_ref.config"},
    {"kolors_ref.models", "kolors_ref.sampling", "kolors_ref.images", "kolors_ref.tokenizer"},
    {"kolors_ref.loading", "kolors_ref.pipeline", "kolors_ref.denoising"},
    {"kolors_ref.mini"},
    {"kolors_ref.cli"},
)
"""From the bottom to the top; what is in none of them may stand anywhere between."""


def imports(path):
    """The modules that a file imports, by their full names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            name = base if node.level else node.module
            found.update({name} | {f"{name}.{alias.name}" for alias in node.names})
    return found


def layer_of(module):
    """The number of a module's layer; None for one that may stand anywhere."""
    fits = [i for i, layer in enumerate(LAYERS) if any(f"{module}.".startswith(f"{name}.") for name in layer)]
    return fits[0] if fits else None


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = sorted([*(ROOT / "kolors_ref").rglob("*.py"), *(ROOT / "weights_conversion").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downward(path):
    found, name = imports(path), name_of(path)
    assert not ORACLES & {module.split(".")[0] for module in found}
    if name.startswith("weights_conversion"):
        assert not any(module.split(".")[0] == "kolors_ref" for module in found)
    if name.startswith("kolors_ref.models."):
        own = {module for module in found if module.startswith("kolors_ref")}
        assert all(f"{module}.".startswith("kolors_ref.config.") for module in own), own
    if (here := layer_of(name)) is not None:
        assert not {module for module in found if (layer_of(module) or 0) > here}
