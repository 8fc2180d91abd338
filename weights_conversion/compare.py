"""Do two checkpoints hold the same tensors, whatever their layouts?"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from weights_conversion.checkpoint import Checkpoint, Network
from weights_conversion.files import byte_chunks
from weights_conversion.keymaps import KEYMAPS


def differences(first: Checkpoint, second: Checkpoint, progress: bool = False) -> Iterator[str]:
    """One sentence for each difference in networks, sizes, names, shapes, dtypes and bytes; nothing if equal.

    Tensors are compared byte by byte, as a stream: NaN equals the same NaN, and 0.0 differs from -0.0.
    """
    for name in KEYMAPS:
        if name in first.networks and name in second.networks:
            yield from _network_differences(first.networks[name], second.networks[name], progress)
        elif name in first.networks or name in second.networks:
            yield f"{name}: only in {(first if name in first.networks else second).path}"


def _network_differences(first: Network, second: Network, progress: bool) -> Iterator[str]:
    if first.config is not None and second.config is not None:
        for field, value in first.config.items():
            if second.config[field] != value:
                yield f"{first.name}: {field} is {value} in the first and {second.config[field]} in the second"
    names = sorted(first.tensors.keys() | second.tensors.keys())
    for name in tqdm(names, desc=f"comparing {first.name}", unit="tensor", leave=False, disable=not progress):
        if name not in second.tensors or name not in first.tensors:
            yield f"{first.name}: {name} is only in the {'first' if name in first.tensors else 'second'}"
        elif difference := _tensor_difference(first.tensors[name], second.tensors[name]):
            yield f"{first.name}: {name} {difference}"


def _tensor_difference(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape:
        return f"has shape {tuple(a.shape)} in the first and {tuple(b.shape)} in the second"
    if a.dtype != b.dtype:
        return f"is {a.dtype} in the first and {b.dtype} in the second"
    if not all(torch.equal(x, y) for x, y in zip(byte_chunks(a), byte_chunks(b), strict=True)):
        return "holds other numbers"
    return None
