"""Muon, an optimizer whose steps are orthogonal matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..precision import fast_dtype

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
"""The coefficients of x, x^3 and x^5 that bring singular values near 1 soonest."""
ITERATIONS = 5
ADAM_RMS = 0.2
"""The root mean square of a step of AdamW, to which steps are scaled: learning rates then mean the same in both
(Liu et al. 2025, section 2.2)."""


class Muon(Optimizer):
    """Steps along each matrix's orthogonalised momentum; learning rate and weight decay mean what they do in AdamW.

    torch.optim.Muon computes in bf16 everywhere, which takes twice as long as all the rest of a training step on a CPU
    without instructions for it. A convolution's weight (C', C, 3, 3) counts as the matrix (C', 9 C).
    """

    def __init__(self, matrices: Iterable[Tensor], weight_decay: float) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step with the learning rate that the group of parameters has."""
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = matrix.grad.flatten(1)
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = self.state[matrix]["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
                direction = orthogonalised(gradient.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                size = ADAM_RMS * max(direction.shape) ** 0.5
                matrix.add_(direction.view_as(matrix), alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix (M, N) with all its singular values brought near 1, by Newton and Schulz's iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / wide.norm().clamp(min=1e-7)).to(fast_dtype(matrix.device))
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.T).to(matrix.dtype)
