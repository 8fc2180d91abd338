"""Who may import whom: a file of a network can be read alone, and the oracles stay in the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLES = {"diffusers", "transformers", "peft", "accelerate"}
ALONE = {
    "kolors_ref.config": (),
    "kolors_ref.images": (),
    "kolors_ref.tokenizer": (),
    "kolors_ref.models": ("kolors_ref.config",),
    "kolors_ref.sampling": ("kolors_ref.config", "kolors_ref.sampling"),
    "weights_conversion": ("weights_conversion",),
}
"""Of ours, what the parts that are read alone may import."""
LAYERS = (
    "config precision allocator unfilled terminal whole_files",
    "models sampling images tokenizer",
    "text_layout arguments request offload hub lora ip_adapter_file image_prompts picture_file denoising decoding",
    "loading pipeline",
    "mini",
    "cli",
)
"""Of kolors_ref, from the bottom to the top."""


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


def is_in(module, package):
    return f"{module}.".startswith(f"{package}.")


def layer_of(module):
    """The number of the layer of a module of kolors_ref; None for the package itself and for others'."""
    fits = [i for i, layer in enumerate(LAYERS) if any(is_in(module, f"kolors_ref.{name}") for name in layer.split())]
    return fits[0] if fits else None


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = sorted([*(ROOT / "kolors_ref").rglob("*.py"), *(ROOT / "weights_conversion").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downward(path):
    found, name = imports(path), name_of(path)
    assert not ORACLES & {module.split(".")[0] for module in found}
    for part, allowed in ALONE.items():
        if is_in(name, part):
            ours = {module for module in found if is_in(module, "kolors_ref") or is_in(module, "weights_conversion")}
            assert all(any(is_in(module, one) for one in allowed) for module in ours), ours
    if is_in(name, "kolors_ref") and name != "kolors_ref.__init__":
        here = layer_of(name)
        assert here is not None, "a new module belongs to one of the layers"
        assert not {module for module in found if (layer_of(module) or 0) > here}
