"""What methods that construct masks layer by layer share: their layers' budgets, and how masks are settled.

A problem comes in with whatever budget and granularity the caller asked for. Integers per layer go out at the
start; masks that keep exactly what was asked for go out at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxprune.scoring.contract import Problem
from fxprune.sparsity.budget import Budget, apportion
from fxprune.sparsity.channel_granularity import fitted
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


def others(problem: Problem) -> dict[str, torch.Tensor]:
    """Parameters of the graph that are not to be pruned, as their |w|: dense, but zeros carry no path."""
    return {
        name: problem.model.get_parameter(name).detach().abs().double().to(problem.device)
        for name in problem.graph.kernels
        if name not in problem.weights
    }


def is_untouched(problem: Problem) -> bool:
    """Whether nothing is to be removed."""
    return problem.budget.total == sum(kept(problem.masks).values())


def settled(
    problem: Problem, scores: Mapping[str, torch.Tensor], layers: Mapping[str, int], name: str
) -> Masks:
    """The masks of the highest scores, layer by layer; under a granularity, as ``budget`` and it allow."""
    granularity = fitted(problem.granularity, problem.graph)
    if granularity == WEIGHT:
        budget = Budget(sum(layers.values()), problem.budget.sizes, dict(layers))
    else:
        budget = problem.budget.capped(granularity.room(problem.masks))
    return select(scores, budget, within=problem.masks, granularity=granularity, method=name)
