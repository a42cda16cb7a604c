"""Tie what belongs to one hidden unit of a recurrent layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.channels.labels import Labels, Lines
from fxprune.graph.ops import KernelSet
from fxprune.graph.units import Units, UnitSide

__all__ = ["tie_units"]


def tie_units(labels: Labels, units: Units, kernels: dict[str, KernelSet]) -> None:
    """Let the entries of each unit go together, and ask for equally many units in every line.

    A line with a parameter that has no kernels keeps all of its units.
    """
    lines = []
    for line in units.lines:
        sides = [_labels(labels, side, kernels) for side in line if side.parameter in kernels]
        first = sides[0][0] if sides else torch.zeros(0, dtype=torch.int64)
        for own in sides:
            labels.tie(own, first)
        if len(sides) < len(line):
            labels.fix(first, f"{units.module}: a hidden unit with weights that cannot be pruned")
        lines.append(first)
    if len(lines) > 1 and len({len(line) for line in lines}) == 1:
        labels.lines.append(Lines(torch.stack(lines), -1, units.module, stay=True))


def _labels(labels: Labels, side: UnitSide, kernels: dict[str, KernelSet]) -> Tensor:
    """The labels of a side of a parameter, (parts, units)."""
    one = kernels[side.parameter]
    table, size = (labels.rows, one.outputs) if side.side == "out" else (labels.columns, one.inputs)
    return (table[side.parameter] + torch.arange(size)).view(side.parts, -1)
