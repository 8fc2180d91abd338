"""The training loop that all stages share; what a step draws depends on its number alone, so a run can be resumed.

A batch is made from the numbers of its examples; everything random in it comes from these numbers, and nothing is kept
from one step to the next but weights, their average, and the optimizer's moments (and in reward tuning a round).
"""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..whole_files import written
from .optimizers import Optimizers
from .processes import Processes
from .recipe import Stage
from .training_state import TrainingState, load_state, save_state

Batch = tuple[Tensor, ...]
CLIP = 1.0
"""The greatest norm of a gradient."""


def train(
    stage: Stage,
    module: nn.Module,
    make_batch: Callable[[range], Batch],
    folder: Path,
    here: Processes,
    previous: bool = False,
    average: AveragedModel | None = None,
) -> nn.Module:
    """Trains a module whose forward maps a batch to its loss; goes on from the last checkpoint in the folder.

    Args:
        stage: its settings.
        module: with its first weights, on the device to train on.
        make_batch: makes the batch of the examples with these numbers.
        folder: of the checkpoints and the curve.
        here: this process; every process takes its share of each batch.
        previous: go on from the last checkpoint but one.
        average: what `average_of` gave, for a caller whose batches depend on it.

    Returns:
        The module with the moving average of its weights.

    Raises:
        ValueError: the checkpoint is damaged or of another run, the batch cannot be shared evenly by the processes, or
            the loss or its gradient is no longer finite.
        OSError: a checkpoint cannot be written.
    """
    here.check_shares(stage.batch_size, f"examples of a batch of {stage.name}")  # the gradient is a plain mean
    average = average_of(stage, module) if average is None else average
    optimizers = Optimizers(stage, module, here)
    settings = json.dumps(asdict(stage))
    state = load_state(folder, stage.name, settings, previous)
    if state is not None:
        try:
            restore(state, module, average, optimizers)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds a {stage.name} of other sizes; train in another folder") from error
    first = 0 if state is None else state.step
    model = DistributedDataParallel(module, gradient_as_bucket_view=True) if here.count > 1 else module
    curve = Curve(folder / f"{stage.name}.jsonl", first) if here.first else None
    with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", disable=not here.first) as bar:
        for step in range(first, stage.steps):
            start = step * stage.batch_size
            batch = make_batch(range(start + here.rank, start + stage.batch_size, here.count))
            with here.autocast(), small_attention(here):
                loss = model(*(tensor.to(here.device) for tensor in batch))
            loss.backward()
            check_finite(stage, step, loss, clip_grad_norm_(module.parameters(), CLIP))
            optimizers.step(step)
            average.update_parameters(module)
            bar.update()
            if curve is not None:
                curve.add(step, loss.item(), bar)
            if (step + 1) % stage.save_every == 0 and step + 1 < stage.steps:
                state = snapshot(step + 1, settings, module, average, optimizers)
                here.first_does(lambda state=state: save_state(folder, stage.name, state))
    return average.module


def small_attention(here: Processes) -> AbstractContextManager:
    """On a CPU, attention as plain matrix products: over so few tokens a fifth faster than the fused kernel."""
    return sdpa_kernel(SDPBackend.MATH) if here.device.type == "cpu" else nullcontext()


def check_finite(stage: Stage, step: int, loss: Tensor, norm: Tensor) -> None:
    """Raises ValueError if the loss or its gradient norm is not finite, before the weights are harmed.

    The gradient is the mean over all processes, so one that has gone astray stops all of them.
    """
    if not (loss.isfinite() and norm.isfinite()):
        raise ValueError(
            f"the loss of {stage.name} is {loss.item():g} and its gradient norm {norm.item():g} at step {step}; "
            "a lower learning rate may help"
        )


def average_of(stage: Stage, module: nn.Module) -> AveragedModel:
    """A moving average of a module's weights, which begins with those that it has."""
    update = lambda old, new, count: get_ema_multi_avg_fn(ema_decay(stage, int(count)))(old, new, count)
    return AveragedModel(module, multi_avg_fn=update)


def ema_decay(stage: Stage, count: int) -> float:
    """The decay of the moving average, smaller at first so that the first weights are forgotten."""
    return min((1 + count) / (10 + count), stage.ema_decay)


def snapshot(
    step: int, settings: str, module: nn.Module, average: AveragedModel, optimizers: Optimizers
) -> TrainingState:
    """Everything that the next step depends on; all processes take it together."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizers.state().items()}
    return TrainingState(step, settings, tensors)


def restore(state: TrainingState, module: nn.Module, average: AveragedModel, optimizers: Optimizers) -> None:
    """Puts back what `snapshot` took."""
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "optimizer": {}}
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    module.load_state_dict(parts["module"])
    average.load_state_dict(parts["average"])
    optimizers.load(parts["optimizer"])


class Curve:
    """The first process's loss as lines of JSON, each an average over the steps since the last, EVERY at most.

    Lines beyond `first` are dropped; a run that goes on between two lines averages over what is left.
    """

    EVERY = 25

    def __init__(self, path: Path, first: int) -> None:
        lines = path.read_text(encoding="utf8").splitlines() if first and path.is_file() else []
        kept = [line for line in lines if self.step_of(line) <= first]
        with written(path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf8")
        self.path, self.losses, self.began = path, [], time.perf_counter()

    @staticmethod
    def step_of(line: str) -> float:
        """The step of a line; infinity for one that is none, as where a full disk cut it short."""
        try:
            return float(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            return float("inf")

    def add(self, step: int, loss: float, bar: tqdm) -> None:
        """Notes the loss of a step; raises OSError if the disk is full."""
        self.losses.append(loss)
        if (step + 1) % self.EVERY == 0:
            now = time.perf_counter()
            mean = sum(self.losses) / len(self.losses)
            line = {"step": step + 1, "loss": round(mean, 6), "seconds": round(now - self.began, 2)}
            try:
                with self.path.open("a", encoding="utf8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} cannot be written: {error.strerror}") from error
            bar.set_postfix(loss=f"{mean:.4f}")
            self.losses, self.began = [], now
