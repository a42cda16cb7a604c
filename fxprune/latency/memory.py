"""Count the most bytes that tensors take at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.torch_private import TorchDispatchMode, pytree

__all__ = ["peak_bytes"]


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the storages of all results; ``peak`` is the most bytes that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key).atexit = False

    def free(self, key: int) -> None:
        """Take a storage off the count."""
        self.now -= self.alive.pop(key, 0)


def peak_bytes(network: torch.nn.Module, run: Callable[[], object]) -> int:
    """Return the most bytes that weights, buffers and the results of operations take while ``run`` runs.

    Memory that an operation uses inside of itself is not seen.

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    >>> x = torch.ones(1, 8)
    >>> with torch.no_grad():
    ...     peak_bytes(net, lambda: net(x))
    184
    """
    counter = _Allocations()
    for tensor in (*network.parameters(), *network.buffers()):
        counter.add(tensor)
    with counter:
        run()
    return counter.peak
