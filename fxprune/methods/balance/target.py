"""Define what a search of masks maximises: the objective of DPaI, and floors under its three figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxprune.methods.dpai.objective import Figures

__all__ = ["FLOOR_PRICES", "UNBOUNDED", "Target"]

FLOOR_PRICES = (2.0, 20.0, 60.0)
"""Penalties for one unit of ln paths, ln nodes, ln kernels below a floor: more than any objective gains."""
LEAST_PRICE = 1e7
"""Penalty for one unit below the least figures: one kernel of a million costs more than anything gains."""
NEAR_FLOOR = 0.95
"""Fraction of a floor that :meth:`Target.is_near_floor` asks for."""
UNBOUNDED = Figures(-1e9, 0, 0)
"""Figures that no masks fall below."""


@dataclass(frozen=True)
class Target:
    """Weights of ln paths, ln nodes and ln kernels, and bounds that these should not fall below.

    Figures below ``floor`` cost ``FLOOR_PRICES``, figures below ``least`` cost ``LEAST_PRICE``.
    """

    weights: tuple[float, float, float]
    floor: Figures
    least: Figures = UNBOUNDED

    def value(self, figures: Figures) -> float:
        """Return the objective less the penalties: with v = (ln R_P, ln R_N, ln R_C) of ``figures``,

        sum of weight * v + FLOOR_PRICE * min(0, v - v_floor) + LEAST_PRICE * min(0, v - v_least).
        """
        if figures.log_paths == -math.inf:
            return -math.inf
        found, floors, least = (_logarithms(x) for x in (figures, self.floor, self.least))
        return sum(
            weight * value + price * min(0.0, value - floor) + LEAST_PRICE * min(0.0, value - bottom)
            for weight, value, floor, bottom, price in zip(
                self.weights, found, floors, least, FLOOR_PRICES, strict=True
            )
        )

    def is_near_floor(self, figures: Figures) -> bool:
        """Return whether nodes and kernels reach ``NEAR_FLOOR`` of their floors, whatever the paths."""
        return (
            figures.nodes >= NEAR_FLOOR * self.floor.nodes
            and figures.kernels >= NEAR_FLOOR * self.floor.kernels
        )


def _logarithms(figures: Figures) -> tuple[float, float, float]:
    return figures.log_paths, math.log(max(figures.nodes, 1)), math.log(max(figures.kernels, 1))
