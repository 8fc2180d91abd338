"""One module a network: `TABLE` (the names of its tensors) and `CONFIG` (the fields of its config.json).

Both are read in both directions, official -> ours and ours -> official, by `table.py` and `fields.py`.
"""

from weights_conversion.keymaps import glm, unet, vae

KEYMAPS = {"text_encoder": glm, "unet": unet, "vae": vae}
"""Component name, as in model_index.json -> the module with its tables."""

__all__ = ["KEYMAPS"]
