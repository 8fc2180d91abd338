"""Low-rank updates of the UNet and the text encoder (LoRA, Hu et al. 2021), attached to and detached from a network.

An adapted layer keeps its weight: a forward hook adds `strength x up(down(x))` to its output, so the module tree, the
names in the state dict and the weights are as they were. `fuse` adds the updates to the weights instead, which costs no
time in the loop; `unfuse` restores the original weights. Files are read and written by `weights_conversion`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_conversion.files import check_numbers
from weights_conversion.lora import LoRA, LowRank, read_lora, save_lora

from .arguments import free_name
from .models.unet import Upsample
from .offload import is_away

__all__ = [
    "LoRA", "LowRank", "attach", "attached", "detach", "fuse", "load", "read_lora", "save_lora", "unfuse", "unload",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """One low-rank update in use: as in the file, its factor in the sum, and its matrices as the layer needs them.

    The hook computes in the layer's dtype; fusing computes from the file's own numbers. Matrices that require gradients
    are cast again in every call, so that gradients reach them and an optimizer's changes take effect.
    """

    low_rank: LowRank
    factor: float
    down: Tensor
    up: Tensor

    @property
    def is_trainable(self) -> bool:
        """Whether its matrices may change from call to call."""
        return self.low_rank.down.requires_grad or self.low_rank.up.requires_grad

    def like(self, weight: Tensor) -> "Update":
        """The update with its matrices in the dtype and on the device of the layer's weight."""
        fits = all(matrix.dtype == weight.dtype and matrix.device == weight.device for matrix in (self.down, self.up))
        if fits and not self.is_trainable:
            return self
        with torch.inference_mode(False):  # what is kept must serve a later call that records gradients
            down, up = (matrix.to(weight.device, weight.dtype) for matrix in (self.low_rank.down, self.low_rank.up))
        return replace(self, down=down, up=up)

    def delta(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What the update adds to the weight, in the shape of the weight."""
        down, up = (matrix.to(weight.device, dtype).flatten(1) for matrix in (self.low_rank.down, self.low_rank.up))
        return (self.factor * up @ down).view(weight.shape)


class Adapter:
    """The updates of one layer by name, and the hook that adds them to the layer's output; it stands in `layer.lora`.

    While the updates are fused into the weight, `base` is the weight without them, kept in main memory, and the hook
    does nothing.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.updates: dict[str, Update] = {}
        self.base: Tensor | None = None
        self.handle = layer.register_forward_hook(self)

    def __call__(self, layer: nn.Linear | nn.Conv2d, inputs: tuple, output: Tensor) -> Tensor:
        """Adds the updates to the output for the layer's input (..., in) or (B, in, h, w)."""
        if self.base is not None:
            return output
        x = layer.enlarge(*inputs) if isinstance(layer, Upsample) else inputs[0]
        for name, kept in self.updates.items():
            update = kept.like(layer.weight)
            if not update.is_trainable:
                self.updates[name] = update
            if isinstance(layer, nn.Conv2d):
                narrow = F.conv2d(x, update.down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
                output = output + F.conv2d(update.factor * narrow, update.up)
            else:
                output = output + F.linear(update.factor * F.linear(x, update.down), update.up)
        return output

    def fuse(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Replaces the weight, which may be mapped from a file and read-only, by one with the updates in it."""
        weight = layer.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)  # rounded once, after the sum
        fused = weight.to(dtype)
        for update in self.updates.values():
            fused = fused + update.delta(weight, dtype)
        self.base = weight.cpu()
        layer.weight = nn.Parameter(fused.to(weight.dtype), layer.weight.requires_grad)

    def unfuse(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Puts the weight back, bit for bit."""
        layer.weight = nn.Parameter(self.base.to(layer.weight), layer.weight.requires_grad)
        self.base = None


def _adapted(network: nn.Module) -> Iterator[tuple[nn.Module, Adapter]]:
    for module in network.modules():
        if "lora" in vars(module):
            yield module, module.lora


# ---------------------------------------------------------------------------------------------------------------------
# One network
# ---------------------------------------------------------------------------------------------------------------------


def attach(network: nn.Module, updates: Mapping[str, LowRank], name: str, scale: float = 1.0) -> None:
    """Attaches low-rank updates to a network, beside those it already has; a fused network is fused again with them.

    Matrices that require gradients get them, and may be changed between calls; they are not among the network's
    parameters, so an optimizer must be given them. While the updates are fused, no gradients reach them.

    Args:
        network: the UNet, the text encoder, or another with linear layers and plain convolutions.
        updates: the name of a layer in the network -> its update.
        name: what to call the updates, for `detach`.
        scale: their weight, 1 as trained; it may be 0 or negative.

    Raises TypeError for a scale that is not a number. Raises ValueError, and leaves the network as it was, for a scale
    that is not finite, a name in use or updates that do not fit the network, saying how many and the first one.
    """
    _check_scale(scale)
    if name in attached(network):
        raise ValueError(f"A LoRA named {name!r} is on the {type(network).__name__} already: choose another name.")
    _check_fit(network, updates)
    was_fused = _is_fused(network)
    unfuse(network)
    modules = dict(network.named_modules())
    for layer_name, low_rank in updates.items():
        layer = modules[layer_name]
        if "lora" not in vars(layer):
            layer.lora = Adapter(layer)
        update = Update(low_rank, float(scale) * low_rank.strength, low_rank.down, low_rank.up)
        layer.lora.updates[name] = update if update.is_trainable else update.like(layer.weight)
    if was_fused:
        fuse(network)


def detach(network: nn.Module, name: str) -> None:
    """Removes the updates of this name from a network; a fused network stays fused with the others.

    Raises ValueError if there are none of this name.
    """
    if name not in attached(network):
        raise ValueError(
            f"There is no LoRA named {name!r} on the {type(network).__name__}: {_list(attached(network))}."
        )
    was_fused = _is_fused(network)
    unfuse(network)
    for layer, adapter in list(_adapted(network)):
        adapter.updates.pop(name, None)
        if not adapter.updates:
            adapter.handle.remove()
            del layer.lora
    if was_fused and attached(network):
        fuse(network)


def attached(network: nn.Module) -> list[str]:
    """The names of the updates on a network."""
    return list(dict.fromkeys(name for _, adapter in _adapted(network) for name in adapter.updates))


def fuse(*networks: nn.Module) -> None:
    """Adds the updates on these networks to their weights; what is already fused stays so.

    The weights without the updates are kept in main memory (no extra memory where they are mapped from a file).

    Raises ValueError if none of the networks has any updates, or the weights are offloaded.
    """
    if not any(attached(network) for network in networks):
        raise ValueError("There is no LoRA to fuse: load one first.")
    if any(is_away(layer.weight) for network in networks for layer, _ in _adapted(network)):
        raise ValueError("A LoRA cannot be fused into weights that are offloaded: it works without being fused.")
    for network in networks:
        for layer, adapter in _adapted(network):
            if adapter.base is None:
                adapter.fuse(layer)


def unfuse(*networks: nn.Module) -> None:
    """Puts back the weights of these networks, bit for bit; their updates work as hooks again."""
    for network in networks:
        for layer, adapter in _adapted(network):
            if adapter.base is not None:
                adapter.unfuse(layer)


def _is_fused(network: nn.Module) -> bool:
    return any(adapter.base is not None for _, adapter in _adapted(network))


def _check_scale(scale: float) -> None:
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"The scale of a LoRA must be a number, not {type(scale).__name__}.")
    if not math.isfinite(scale):
        raise ValueError(f"The scale of a LoRA is {scale}, and it must be finite.")


def _check_fit(network: nn.Module, updates: Mapping[str, LowRank]) -> None:
    modules = dict(network.named_modules())
    wrong = []
    for name, low_rank in updates.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) and type(layer) not in (nn.Conv2d, Upsample):
            wrong.append(f"{name!r}, which is not a linear layer or convolution there")
            continue
        right = tuple(layer.weight.shape)
        found = (low_rank.up.shape[0], *low_rank.down.shape[1:])
        if found != right or low_rank.up.ndim != low_rank.down.ndim:
            wrong.append(f"{name!r}, whose weight is of the shape {right} there and {found} here")
    if wrong:
        count = f"{len(wrong)} of its {len(updates)} updates"
        raise ValueError(
            f"The LoRA is for another {type(network).__name__}: {count} do not fit, the first is {wrong[0]}."
        )


def _list(names: list[str]) -> str:
    return f"there are {', '.join(map(repr, names))}" if names else "there are none"


# ---------------------------------------------------------------------------------------------------------------------
# A pipeline's networks
# ---------------------------------------------------------------------------------------------------------------------


def load(networks: Mapping[str, nn.Module], path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
    """Reads a LoRA file (see `read_lora`) and puts it on the networks it is for, on all of them or on none.

    Args:
        networks: "unet" and "text_encoder" -> the network.
        path: the file or its folder.
        scale: the weight of its updates, 1 as trained.
        name: what to call it, for `unload`; if None the file's name without its suffix, numbered if that is in use.

    Returns:
        Its name.

    Raises as `read_lora` and `attach`; ValueError for a file with updates for a network that is not there.
    """
    _check_scale(scale)
    lora = read_lora(path)
    if name is None:
        name = free_name(Path(path).name if Path(path).is_dir() else Path(path).stem, _loaded(networks))
    for network, updates in lora.networks.items():
        if network not in networks:
            raise ValueError(f"{path} has {len(updates)} updates for a network that is not there, the {network}.")
        _check_fit(networks[network], updates)
        for layer, low_rank in updates.items():
            for matrix in (low_rank.down, low_rank.up):
                check_numbers(matrix.double(), f"{path}: the update of {network}.{layer}")
    if name in _loaded(networks):
        raise ValueError(f"A LoRA named {name!r} is loaded already: unload it or choose another name.")
    for network, updates in lora.networks.items():
        attach(networks[network], updates, name, scale)
    return name


def unload(networks: Mapping[str, nn.Module], name: str | None = None) -> None:
    """Takes a LoRA off the networks, or all of them if name is None; raises ValueError for an unknown name."""
    loaded = _loaded(networks)
    if name is not None and name not in loaded:
        raise ValueError(f"No LoRA named {name!r} is loaded: {_list(loaded)}.")
    for network in networks.values():
        for found in attached(network):
            if name in (None, found):
                detach(network, found)


def _loaded(networks: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name for network in networks.values() for name in attached(network)))
