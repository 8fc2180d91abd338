"""The optimizers of a stage: AdamW for all of a module, or Muon for its matrices and AdamW for the rest."""

import torch
from torch import Tensor, nn

from .recipe import Stage

BETAS = (0.9, 0.99)
"""The decays of AdamW's moments."""


class Optimizers:
    """AdamW (Loshchilov and Hutter 2017) and, where the stage has a learning rate for it, Muon (Jordan et al. 2024).

    Muon orthogonalises the momentum of a matrix before it steps; a convolution's weight (C', C, 3, 3) counts as the
    matrix (C', 9 C). The module's `hidden_matrices` are Muon's.
    """

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        self.stage = stage
        self.matrices = module.hidden_matrices() if stage.matrix_rate else []
        taken = set(map(id, self.matrices))
        rest = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        self.parts = [torch.optim.AdamW(rest, betas=BETAS, weight_decay=stage.weight_decay, fused=True)]
        self.views = [matrix.detach().flatten(1) for matrix in self.matrices]
        if self.views:
            self.parts.append(
                torch.optim.Muon(self.views, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, number: int) -> None:
        """Takes step `number` of the stage and drops the gradients."""
        decay = self.stage.decay_at(number)
        for part, rate in zip(self.parts, (self.stage.learning_rate, self.stage.matrix_rate), strict=False):
            part.param_groups[0]["lr"] = rate * decay
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad = matrix.grad.flatten(1)
            matrix.grad = None
        for part in self.parts:
            part.step()
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The moments, as tensors by name."""
        return {
            f"{i}.{number}.{name}": tensor
            for i, part in enumerate(self.parts)
            for number, moments in part.state_dict()["state"].items()
            for name, tensor in moments.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.parts]
        for key, tensor in tensors.items():
            i, number, name = key.split(".")
            states[int(i)].setdefault(int(number), {})[name] = tensor
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
