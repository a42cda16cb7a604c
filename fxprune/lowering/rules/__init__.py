"""Op rules, one function each, beside their siblings; ``RULES`` merges the families."""

from __future__ import annotations

from typing import Any

from fxprune.lowering.rules import (
    attention,
    choices,
    contraction,
    creation,
    derivatives,
    distances,
    fourier,
    linear_algebra,
    live_sizes,
    modes,
    movement,
    norm,
    own_functions,
    pointwise,
    pool,
    recurrent,
    sampling,
    weighted,
)
from fxprune.lowering.rules.table import Rule, merge

__all__ = ["KERNEL_TARGETS", "RULES"]

RULES: dict[Any, Rule] = merge(
    [
        weighted.table,
        norm.table,
        pointwise.table,
        pool.table,
        movement.table,
        contraction.table,
        creation.table,
        derivatives.table,
        attention.table,
        recurrent.table,
        choices.table,
        distances.table,
        fourier.table,
        linear_algebra.table,
        live_sizes.table,
        modes.table,
        sampling.table,
        own_functions.table,
    ]
)

# Ops that apply a parameter even to a constant: they are never folded away, so that every kernel is known.
KERNEL_TARGETS = set(weighted.table.rules)
