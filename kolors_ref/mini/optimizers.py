"""The optimizers of a stage: AdamW for all of a module, or Muon for its matrices and AdamW for the rest."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .muon import Muon
from .processes import Processes
from .recipe import Stage

BETAS = (0.9, 0.99)
"""The decays of AdamW's moments."""


class Optimizers:
    """AdamW (Loshchilov and Hutter 2017) and, where the stage has a learning rate for it, Muon.

    The module's `hidden_matrices` are Muon's. Its steps are slow, so each process updates its share of the matrices and
    broadcasts the result.
    """

    def __init__(self, stage: Stage, module: nn.Module, here: Processes) -> None:
        self.stage, self.here = stage, here
        self.matrices = module.hidden_matrices() if stage.matrix_rate else []
        taken = set(map(id, self.matrices))
        rest = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        self.parts = [torch.optim.AdamW(rest, betas=BETAS, weight_decay=stage.weight_decay, fused=True)]
        by_size = sorted(range(len(self.matrices)), key=lambda number: -self.matrices[number].numel())
        self.shares = [by_size[rank :: here.count] for rank in range(here.count)]
        mine = self.shares[here.rank]
        self.numbers = (range(len(rest)), mine)  # of the parameters of either part, the same in every process
        if mine:
            self.parts.append(Muon([self.matrices[number] for number in mine], stage.weight_decay))

    def step(self, number: int) -> None:
        """Takes step `number` of the stage and drops the gradients."""
        factor = self.stage.rate_factor(number)
        for part, rate in zip(self.parts, (self.stage.learning_rate, self.stage.matrix_rate), strict=False):
            part.param_groups[0]["lr"] = rate * factor
        for part in self.parts:
            part.step()
            part.zero_grad()
        for matrix in self.matrices:
            matrix.grad = None
        if self.here.count > 1:
            self.tell_weights()

    @torch.no_grad()
    def tell_weights(self) -> None:
        """Gives every process the matrices that another one has changed."""
        for rank, share in enumerate(self.shares):
            matrices = [self.matrices[number] for number in share]
            if matrices:
                told = torch.cat([matrix.flatten() for matrix in matrices])
                dist.broadcast(told, rank)
                for matrix, values in zip(matrices, told.split([matrix.numel() for matrix in matrices]), strict=True):
                    matrix.copy_(values.view_as(matrix))

    def state(self) -> dict[str, Tensor]:
        """The moments, as tensors by name. All processes have to ask together, and each gets those of all."""
        moments = {
            f"{i}.{self.numbers[i][number]}.{name}": tensor
            for i, part in enumerate(self.parts)
            for number, named in part.state_dict()["state"].items()
            for name, tensor in named.items()
        }
        if self.here.count > 1 and self.matrices:
            theirs: list[dict[str, Tensor]] = [{} for _ in range(self.here.count)]
            dist.all_gather_object(theirs, {key: tensor.cpu() for key, tensor in moments.items() if key[0] == "1"})
            moments |= {key: tensor for shared in theirs for key, tensor in shared.items()}
        return moments

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.parts]
        for key, tensor in tensors.items():
            i, number, name = key.split(".")
            numbers = self.numbers[int(i)]
            if int(number) in numbers:
                states[int(i)].setdefault(numbers.index(int(number)), {})[name] = tensor
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
