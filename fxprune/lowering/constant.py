"""Tensors of the captured network that do not depend on its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.reads import Reads

__all__ = ["Constant", "Joined", "unknown_numbers", "without_numbers"]


def unknown_numbers() -> Any:
    """Raise ``RuntimeError``: for constants of which nothing but their presence is known."""
    raise RuntimeError("these numbers are others in each run")


@dataclass(frozen=True)
class Joined:
    """The parts of a constant, one after the other along an axis; some of them are parameters."""

    axis: int
    parts: tuple[Constant, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the input: its shape, the parameter it is a view of, and how to
    compute it.

    ``weight`` is set while the constant is one prunable parameter, moved about or re-parameterised;
    ``evaluate`` gives the actual numbers. ``is_learnt`` marks what comes from parameters or buffers: its
    zeros are accidents of the present values. ``zero`` marks what is zero throughout. A statistic of the
    input (a variance, a length) counts as a constant, too: ``statistic`` is the set of axes, counted from the
    last one as -1, along which entries of the input went into it, as far as its shape does not show it.
    ``is_empty``: memory that nobody has written to yet, taken for zeros, and never for an index.
    ``reads`` follows the parameters and buffers in it, entry by entry. ``joined``: the parameters that were
    joined to it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    evaluate: Callable[[], Any]
    weight: ir.WeightRef | None = None
    zero: bool = False
    is_learnt: bool = False
    statistic: frozenset[int] | None = None
    reads: Reads | None = None
    is_empty: bool = False
    joined: Joined | None = None

    def moved(self, view: TensorFunction, shape: tuple[int, ...]) -> Constant:
        """The constant after a movement of its entries; of what it is, only the parameter is kept."""
        ref = self.weight
        if ref is not None:
            whole = (ref.view or TensorFunction()).followed_by(view)
            ref = ir.WeightRef(ref.name, shape, whole, ref.direct, ref.computed, ref.scaled)
        return Constant(shape, self.dtype, lambda: view(self.evaluate()), ref, is_learnt=self.is_learnt)

    def select(self, axis: int) -> Constant:
        """The constant without an axis of size one."""
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return self.moved(TensorFunction.of("select", PREVIOUS, axis, 0), shape)

    def numbers(self) -> Tensor | None:
        """The numbers, or ``None`` where they cannot be had (on the meta device, in memory without any, and
        where they are others in each run)."""
        if self.is_empty:
            return None
        try:
            result = self.evaluate()
        except RuntimeError:
            return None
        return None if not isinstance(result, Tensor) or result.device.type == "meta" else result.cpu()


def without_numbers(x: Any) -> Any:
    """Return a constant of which nothing but its presence is known; all else as it is."""
    return Constant(x.shape, x.dtype, unknown_numbers, reads=x.reads) if isinstance(x, Constant) else x
