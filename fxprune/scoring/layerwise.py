"""Budgets of layers, and selection by layer, for methods that choose weights layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxprune.scoring.contract import Problem
from fxprune.sparsity.budget import Budget, apportion
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select


def layer_budgets(problem: Problem) -> dict[str, int]:
    """Weights to keep in every layer: those the caller fixed, else the total split by ERK.

    ERK shares are proportional to the sum of the weight's dims (Evci et al. 2020), as ``budget="erk"`` has
    them.
    """
    if problem.budget.layers is not None:
        return dict(problem.budget.layers)
    shares = {name: float(sum(weight.shape)) for name, weight in problem.weights.items()}
    return apportion(problem.budget.total, shares, kept(problem.masks))


def is_untouched(problem: Problem) -> bool:
    """Whether nothing is to be removed."""
    return problem.budget.total == sum(kept(problem.masks).values())


def select_by_layer(
    problem: Problem, scores: Mapping[str, torch.Tensor], layers: Mapping[str, int], name: str
) -> Masks:
    """Keep the highest scores: ``layers`` gives the number per layer.

    Under a granularity other than single weights the problem's own budget holds, as far as there is room.
    """
    granularity = problem.granularity
    if granularity == WEIGHT:
        budget = Budget(sum(layers.values()), problem.budget.sizes, dict(layers))
    else:
        budget = problem.budget.capped(granularity.room(problem.masks))
    return select(scores, budget, within=problem.masks, granularity=granularity, method=name)
