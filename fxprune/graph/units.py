"""Hidden units: entries of several parameters that one module gives one number of, and that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["UnitSide", "Units"]


@dataclass(frozen=True)
class UnitSide:
    """The output channels (``side`` is "out") or input channels ("in") of a parameter, in equal ``parts``.

    Entry ``j`` of every part belongs to unit ``j``: the rows of an LSTM have four parts, one for each gate.
    """

    parameter: str
    side: Literal["out", "in"]
    parts: int = 1


@dataclass(frozen=True)
class Units:
    """The hidden units of a module that has one width for all of its ``lines``.

    A line lists what belongs to the units of one layer in one direction. The module holds as many units in
    every line.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.GRU(2, 5))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(3, 1, 2)))
        >>> for side in graph.units[0].lines[0]:
        ...     print(side.parameter, side.side, side.parts)
        0.weight_ih_l0 out 3
        0.weight_hh_l0 out 3
        0.weight_hh_l0 in 1
    """

    module: str
    lines: tuple[tuple[UnitSide, ...], ...]
