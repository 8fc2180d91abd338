"""Networks built without memory, to be filled with a file's tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules built in this context have shapes and dtypes, but no data and no memory (the meta device)."""
    with torch.device("meta"), NoFirstWeights():
        yield


class NoFirstWeights(TorchFunctionMode):
    """Skips weight initialisation, for which torch would import its compiler, which takes seconds."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls a function of torch, but gives back the tensor that one of `torch.nn.init` would fill."""
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
