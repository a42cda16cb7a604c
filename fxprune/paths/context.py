"""The form of a compiled step, and what it may ask of whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.layout import Layout

__all__ = ["Borders", "Compiled", "EvalContext", "LinearMap", "Pooling", "unit_operand"]

Borders = Literal["zeros", "periodic", "inner"]
"""The entries that windows read beyond the border of an image: zeros, as the network does; those of the other
end of the image; or ("inner") zeros, where a step may leave out taps that reach the border. Such a program
finds only paths that there are, perhaps not all."""

Pooling = Literal["sum", "mean", "any"]
"""How average pooling combines entries. ``"any"``: entries are 0 or 1, and every pooling adds them."""


@dataclass(frozen=True)
class EvalContext:
    """Weight lookup and pooling mode of one evaluation of a step.

    ``operand(weight)`` is the tensor that a contraction multiplies by. ``constant`` is the value of entries
    that hold a constant: 0 where paths are counted, 1 where presence is tested.
    """

    operand: Callable[[ir.WeightRef], Tensor]
    pooling: Pooling
    constant: float = 0.0


def unit_operand(weight: ir.WeightRef) -> Tensor:
    """The operand of a contraction whose parameter is all ones."""
    return weight.operand(lambda _: torch.ones(weight.shape))


LinearMap = Callable[[EvalContext, Sequence[Tensor]], Tensor]
Compiled = tuple[Layout, LinearMap]
