"""What a search of masks is after: figures of a network come in, one number to maximise goes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxprune.methods.dpai.objective import Figures

__all__ = ["GUARD", "NOTHING", "Aim"]

GUARD = (2.0, 20.0, 60.0)
"""Prices of falling below a floor, per unit of ln paths, ln nodes, ln kernels: above what objectives pay."""

NEAR = 0.95
"""What share of a floor may stand in for it where all is given up for something else."""


NEVER = 1e7
"""Price of falling below the least that is accepted: one kernel of a million is more than any gain."""
NOTHING = Figures(-1e9, 0, 0)


def _logarithms(figures: Figures) -> tuple[float, float, float]:
    return figures.log_paths, math.log(max(figures.nodes, 1)), math.log(max(figures.kernels, 1))


@dataclass(frozen=True)
class Aim:
    """What is maximised: ``weights`` of ln paths, ln nodes and ln kernels, none of which shall fall below
    its ``floor`` (a :class:`Figures`), and none for any price below the ``least``.
    """

    weights: tuple[float, float, float]
    floor: Figures
    least: Figures = NOTHING

    def value(self, figures: Figures) -> float:
        """The objective, less what is missing to the floors."""
        if figures.log_paths == -math.inf:
            return -math.inf
        found, floors, least = (_logarithms(x) for x in (figures, self.floor, self.least))
        return sum(
            weight * value + price * min(0.0, value - floor) + NEVER * min(0.0, value - bottom)
            for weight, value, floor, bottom, price in zip(
                self.weights, found, floors, least, GUARD, strict=True
            )
        )

    def allows(self, figures: Figures) -> bool:
        """Whether nodes and kernels are on their floors, or nearly: no number of paths pays for many."""
        return figures.nodes >= NEAR * self.floor.nodes and figures.kernels >= NEAR * self.floor.kernels
