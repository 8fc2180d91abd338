"""Where randomness comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all pictures, one for each, or torch's own."""


def draw_noise(shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draws unit noise as diffusers does: on the generator's device, row by row where each has its own generator."""
    if isinstance(generator, list | tuple) and len(generator) > 1:
        return torch.cat([draw_noise((1, *shape[1:]), one, device, dtype) for one in generator])
    generator = generator[0] if isinstance(generator, list | tuple) else generator
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)
