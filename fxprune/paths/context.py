"""What a running step may ask for, and the form of a compiled step.

In: nothing. Out: the types that compile functions and the interpreter share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.layout import Layout

__all__ = ["Compiled", "Counting", "Linear", "Setting"]

Counting = Literal["sum", "mean", "any"]


class Setting(Protocol):
    """What a running step asks for: the weights, and how pools count (``any``: entries are 0 or 1)."""

    @property
    def counting(self) -> Counting: ...
    @property
    def constant(self) -> float:
        """What a constant entry is worth: nothing on the track of paths, one on the track of presence."""
        ...

    def operand(self, weight: ir.WeightRef) -> Tensor: ...


Linear = Callable[[Setting, Sequence[Tensor]], Tensor]
Compiled = tuple[Layout, Linear]
