"""Several processes, as torchrun starts them, that work together: who this one is, and how they meet."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..precision import fast_dtype

CONNECTION_LOST = re.compile("Connection (closed|reset) by peer")
"""What gloo says to a process when another one has ended."""


@dataclass(frozen=True)
class Processes:
    """This process among all: number `rank` of `count`, computing on `device`."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def first_does(self, work: Callable[[], object]) -> None:
        """Has the first process do something for all, while the others wait.

        Raises what the work raises; the other processes end then, with exit status 2 and without a word.
        """
        error = None
        if self.first:
            try:
                work()
            except Exception as raised:
                error = raised
        if self.count > 1:
            failed = [error is not None]
            dist.broadcast_object_list(failed, device=self.device)
            if failed[0] and not self.first:
                raise SystemExit(2)
        if error is not None:
            raise error

    def autocast(self) -> AbstractContextManager:
        """Computes in bf16 what may be, if the device is fast in it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast_dtype(self.device) == torch.bfloat16)

    def check_shares(self, count: int, what: str) -> None:
        """Raises ValueError unless every process has the same share of `count` things."""
        if count % self.count:
            raise ValueError(
                f"the {count} {what} cannot be shared evenly by {self.count} processes; start a number of processes "
                "that divides them"
            )


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Joins the other processes that torchrun started, if any: by NCCL on a GPU each, by gloo on CPUs.

    Args:
        device: "cpu" or "cuda"; a GPU where there is one if None.

    Raises:
        ValueError: the device does not exist here, or there are fewer GPUs than processes.
        ConnectionError: another process has ended in the middle of the work.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"the device is {device!r}; it must be 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("the device 'cuda' cannot be used here; 'cpu' always can")
    count, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    place = torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs here; start one process for each at most")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)  # NCCL meets on the current device, or all processes would meet on the first
    if count == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None)
    try:
        yield Processes(dist.get_rank(), count, place)
    except RuntimeError as error:
        if not CONNECTION_LOST.search(str(error)):
            raise
        raise ConnectionError("another process has ended; its own message or torchrun's says why") from error
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others, and torchrun ends them
