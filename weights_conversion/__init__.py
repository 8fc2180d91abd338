"""Names and files of Kolors checkpoints: open, convert and compare them, whatever layout they are in.

This package contains no network. It reads the layouts in use (see `checkpoint.py`), gives every tensor the name that
`kolors_ref` uses (see `keymaps/`), and never holds more than one tensor of a checkpoint in memory.
"""

from weights_conversion.checkpoint import Checkpoint, Network, open_checkpoint
from weights_conversion.compare import differences
from weights_conversion.convert import convert

__all__ = ["Checkpoint", "Network", "convert", "differences", "open_checkpoint"]
