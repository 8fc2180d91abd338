"""Networks larger than memory: their weights stay in the mapped file and visit the device when they are needed.

Hooks around a network's blocks bring the weights and take them away, so the networks are unaware of it and compute the
same numbers. Between its visits a weight is a shadow: a tensor of the right shape, type and device without memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor, nn

from .models.glm import Layer
from .models.unet import ResBlock, TransformerBlock, UNet

MODES = ("none", "model", "stream")
BLOCKS = (Layer, ResBlock, TransformerBlock)
"""Modules that are units when a network streams; outside these, every layer is one."""
Check = Callable[[str, Tensor], None]
"""Refuses the tensor of that name if it is damaged."""
ALIGNMENT = 256
"""In bytes, of each weight in a buffer: the most that any kernel asks for."""
KEPT = 35 * 10**8
"""Bytes of the UNet that a stream to CUDA lets stay, if twice as many are free: in fp16 two thirds of all."""
SMALL = 10**7
"""Bytes below which starting a copy costs more than the copy itself."""


# ---------------------------------------------------------------------------------------------------------------------
# What moves
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that visits the device.

    Attributes:
        stored: the tensor mapped from the file.
        absent: its shadow, which holds the dtype to compute in and the device.
    """

    name: str
    parameter: nn.Parameter
    stored: Tensor
    absent: Tensor

    @property
    def is_convolution(self) -> bool:
        """Whether it is to be laid out channels-last."""
        return self.stored.ndim == 4

    @property
    def num_bytes(self) -> int:
        """Its size on the device, rounded up to the alignment of the next weight in a buffer."""
        return math.ceil(self.stored.numel() * self.absent.element_size() / ALIGNMENT) * ALIGNMENT


class Unit:
    """Weights that come and go together: those of a block, a layer or a whole network.

    Attributes:
        network: all units of its network, in the order in which they were made.
        following: the unit expected to be needed next.
        stays: whether it stays on the device while its network is at work.
    """

    def __init__(self, weights: list[Weight], check: Check) -> None:
        self.weights, self.check, self.checked = weights, check, False
        self.network = (self,)
        self.following: Unit | None = None
        self.stays = False

    @property
    def num_bytes(self) -> int:
        """What it takes on the device."""
        return sum(weight.num_bytes for weight in self.weights)

    def check_once(self) -> None:
        """Checks the weights before their first visit, so that those of a damaged file are refused."""
        for weight in [] if self.checked else self.weights:
            self.check(weight.name, weight.stored)
        self.checked = True

    @torch.inference_mode(False)  # what stays may serve a later call that records gradients
    def arrive(self) -> None:
        """Brings all weights or none; on a CPU those already of the right dtype and layout are used in place."""
        self.check_once()
        try:
            for weight in self.weights:
                layout = torch.channels_last if weight.is_convolution else torch.preserve_format
                place = {"device": weight.absent.device, "dtype": weight.absent.dtype}
                weight.parameter.data = weight.stored.to(**place, memory_format=layout)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Drops the weights from the device."""
        for weight in self.weights:
            weight.parameter.data = weight.absent


# ---------------------------------------------------------------------------------------------------------------------
# How it moves
# ---------------------------------------------------------------------------------------------------------------------


class Carrier(Protocol):
    """What is told before and after a unit computes.

    Attributes:
        capacity: bytes of a network's weights that may stay while it is at work.
    """

    capacity: int

    def before(self, unit: Unit) -> None:
        """Makes sure that the unit's weights are there."""

    def after(self, unit: Unit) -> None:
        """The unit has computed."""

    def clear(self) -> None:
        """Removes all weights that are still there."""


class OneAtATime:
    """A unit stays until another needs its place: for whole networks."""

    capacity = 0

    def __init__(self) -> None:
        self.present: Unit | None = None

    def before(self, unit: Unit) -> None:
        """See `Carrier.before`."""
        if unit is self.present:
            return
        self.clear()
        unit.arrive()
        self.present = unit

    def after(self, unit: Unit) -> None:
        """See `Carrier.after`."""

    def clear(self) -> None:
        """See `Carrier.clear`."""
        unit, self.present = self.present, None
        if unit is not None:
            unit.leave()


class Stream:
    """A unit leaves as soon as it has computed: for devices that gain nothing by looking ahead."""

    capacity = 0

    def before(self, unit: Unit) -> None:
        """See `Carrier.before`."""
        unit.arrive()

    def after(self, unit: Unit) -> None:
        """See `Carrier.after`."""
        unit.leave()

    def clear(self) -> None:
        """See `Carrier.clear`."""


class Slot:
    """A buffer on the accelerator, its twin in pinned memory that copies start from, and what is known of both."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
        self.holds: Unit | None = None

    def views(self, memory: Tensor, unit: Unit) -> Iterator[Tensor]:
        """Returns the place of each weight of a unit in the buffer or its twin."""
        start = 0
        for weight in unit.weights:
            size = weight.stored.numel() * weight.absent.element_size()
            place = memory[start : start + size].view(weight.absent.dtype)
            if weight.is_convolution:
                out_channels, in_channels, *kernel = weight.absent.shape
                yield place.view(out_channels, *kernel, in_channels).movedim(-1, 1)
            else:
                yield place.view(weight.absent.shape)
            start += weight.num_bytes


class PinnedStream:
    """`Stream` for CUDA: some units stay; of the others, the next one is copied while the current one computes."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self.device, self.copying = device, torch.cuda.Stream(device)
        self.slots: list[Slot] = []
        self.network: tuple[Unit, ...] = ()
        self.staying: list[Unit] = []
        self.last: Unit | None = None

    def before(self, unit: Unit) -> None:
        """See `Carrier.before`."""
        if unit.network is not self.network:
            self.make_room(unit.network)
        if unit.stays:
            if unit not in self.staying:
                unit.arrive()
                self.staying.append(unit)
            return
        if self.last is not None:
            self.last.following = unit
        self.last = unit
        slot = self.fetch(unit)
        self.slots = [*(other for other in self.slots if other is not slot), slot]
        torch.cuda.current_stream(self.device).wait_event(slot.copied)
        for weight, view in zip(unit.weights, slot.views(slot.buffer, unit), strict=True):
            weight.parameter.data = view

    def after(self, unit: Unit) -> None:
        """See `Carrier.after`."""
        if unit.stays:
            return
        unit.leave()
        self.slots[-1].used.record(torch.cuda.current_stream(self.device))
        if unit.following is not None:
            self.fetch(unit.following)

    def clear(self) -> None:
        """See `Carrier.clear`."""
        while self.staying:
            self.staying.pop().leave()
        if self.last is not None:
            self.last.leave()  # it is still there if its computation failed
        # Memory of the slots must not be used for something else before the last copy has ended.
        torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self.slots, self.network, self.last = [], (), None

    @torch.inference_mode(False)  # the slots outlast the call
    def make_room(self, network: tuple[Unit, ...]) -> None:
        """Drops what there is of another network, and makes two slots for the units of this one that do not stay."""
        self.clear()
        room = max((unit.num_bytes for unit in network if not unit.stays), default=0)
        self.slots = [Slot(room, self.device) for _ in range(2)]
        # What was computed last may still work on what was in this memory.
        self.copying.wait_stream(torch.cuda.current_stream(self.device))
        self.network = network

    @torch.inference_mode(False)
    def fetch(self, unit: Unit) -> Slot:
        """Starts to copy a unit into the slot that was used longer ago, unless it is in one already."""
        for slot in self.slots:
            if slot.holds is unit:
                return slot
        slot = self.slots[0]
        slot.holds = None
        slot.copied.synchronize()  # after a wrong guess the pinned twin is still being read
        slot.used.synchronize()  # so is the buffer, while the unit before the last computes
        unit.check_once()
        for weight, view in zip(unit.weights, slot.views(slot.pinned, unit), strict=True):
            view.copy_(weight.stored)
        with torch.cuda.stream(self.copying):
            slot.buffer[: unit.num_bytes].copy_(slot.pinned[: unit.num_bytes], non_blocking=True)
            slot.copied.record()
        slot.holds = unit
        return slot


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def make_carrier(mode: str, device: torch.device) -> Carrier | None:
    """Returns what moves the weights of all networks, or None if they stay; ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"offload is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "none":
        return None
    if mode == "model":
        return OneAtATime()
    if device.type != "cuda":
        return Stream()
    free, _ = torch.cuda.mem_get_info(device)
    return PinnedStream(device, min(KEPT, free // 2))


def let_rest(
    network: nn.Module,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    carrier: Carrier,
    check: Check,
) -> None:
    """Gives a network shadows in place of weights, and the hooks that bring the stored ones when it computes.

    The network is on the meta device; `stored` are its weights by name, mapped from a file, cast to `dtype`.
    """
    nan = torch.full((), math.nan, dtype=dtype, device=device)
    network.load_state_dict({name: nan.expand(tensor.shape) for name, tensor in stored.items()}, assign=True)
    groups = {
        head: [Weight(name, parameter, stored[name], parameter.data) for name, parameter in parameters.items()]
        for head, parameters in parameters_by_unit(network).items()
    }
    if isinstance(carrier, OneAtATime):
        units = dict.fromkeys(groups, Unit([weight for group in groups.values() for weight in group], check))
    else:
        units = {head: Unit(group, check) for head, group in groups.items()}
    heads = computed_once(network)
    once = {unit for head, unit in units.items() if head in heads}
    let_stay(tuple(dict.fromkeys(units.values())), once, carrier.capacity)
    for head, unit in units.items():
        head.register_forward_pre_hook(lambda head, inputs, unit=unit: carrier.before(unit))
        head.register_forward_hook(lambda head, inputs, output, unit=unit: carrier.after(unit))
        head.register_forward_hook(refuse_gradients)


def refuse_gradients(head: nn.Module, inputs: tuple, output: Tensor) -> None:
    """Raises RuntimeError if the output requires a gradient: the weights may be gone when that is computed."""
    if output.requires_grad:
        raise RuntimeError('gradients need weights that stay; load with offload="none"')


def is_away(parameter: nn.Parameter) -> bool:
    """Whether a parameter is the shadow of a weight that rests in its file."""
    return parameter.numel() > 1 and not any(parameter.stride())


def let_stay(network: tuple[Unit, ...], once: set[Unit], capacity: int) -> None:
    """Joins units into one network and decides which stay once they are there: none that compute only once.

    Small ones do, and those with convolutions, whose layout is slow to change; then as many of the rest as fit, spread
    evenly, so that there is always time to copy the next one that does not.
    """
    size = lambda units: sum(unit.num_bytes for unit in units)
    rest = [unit for unit in network if unit not in once]
    stay = [unit for unit in rest if unit.num_bytes < SMALL or any(weight.is_convolution for weight in unit.weights)]
    if size(stay) > capacity:
        stay = []
    rest, owed = [unit for unit in rest if unit not in stay], 0.0
    share = (capacity - size(stay)) / max(1, size(rest))
    for unit in rest:
        owed += share * unit.num_bytes
        if owed >= unit.num_bytes:
            stay.append(unit)
            owed -= unit.num_bytes
    for unit in network:
        unit.network, unit.stays = network, unit in stay
    moving = [unit for unit in network if not unit.stays]
    for unit, following in zip_longest(moving, moving[1:]):
        unit.following = following


def make_way(network: nn.Module, carrier: Carrier) -> None:
    """Removes visiting weights from the device before a network that needs much memory computes."""

    def clear(network: nn.Module, inputs: tuple) -> None:
        carrier.clear()
        torch.cuda.empty_cache()  # cached blocks the size of weights would be of no other use

    network.register_forward_pre_hook(clear)


def computed_once(network: nn.Module) -> set[nn.Module]:
    """Returns the modules that compute once per picture: all of a text encoder; of the UNet what `prepare` calls."""
    if not isinstance(network, UNet):
        return set(network.modules())
    return {network.text_proj, *network.size_embed.modules(), *projections(network)}


def projections(network: nn.Module) -> set[nn.Module]:
    """Returns the projections of cross-attentions to keys and values."""
    attentions = [module.cross_attn for module in network.modules() if isinstance(module, TransformerBlock)]
    return {projection for attention in attentions for projection in (attention.k, attention.v)}


def parameters_by_unit(network: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Returns the parameters that the call of a block, or of a layer outside of blocks, needs, by their full names.

    Each cross-attention projection to keys or values is a unit of its own.
    """
    apart = projections(network)
    units: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def visit(module: nn.Module, prefix: str, head: nn.Module | None) -> None:
        head = module if module in apart or (head is None and isinstance(module, BLOCKS)) else head
        for name, parameter in module.named_parameters(recurse=False):
            units.setdefault(head or module, {})[prefix + name] = parameter
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", head)

    visit(network, "", None)
    return units
