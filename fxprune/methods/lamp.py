"""LAMP: magnitudes that may be compared across layers."""

from __future__ import annotations

import torch

from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.sparsity.masks import Masks


def lamp() -> Method:
    """Layer-adaptive magnitudes (Lee, Park, Mo, Ahn, Shin 2021, arXiv 2010.07611).

    Score: ``w_u^2`` over the sum of ``w_v^2`` of all weights v of the layer with ``|w_v| >= |w_u|`` (eq. 4):
    how much pruning this weight, after all smaller ones, changes what the layer computes, at most. The
    largest weight of every layer has the score 1, so that no layer is emptied. Needs nothing.

    Weights that are pruned already count as zeros. Of equal weights the earlier one counts as the larger.

    Cost: one sort of the weights of each layer.
    When: after training, in one shot, where the scales of layers differ.
    """
    return Method(
        name="lamp",
        find=from_scores(_scores, name="lamp"),
        summary="keeps the largest weights, by their share of the larger ones of their layer",
        paper="Lee et al. 2021, arXiv 2010.07611",
        reads_only=True,
    )


def _scores(problem: Problem, masks: Masks) -> Scores:
    return {name: _score(weight * masks[name]) for name, weight in problem.weights.items()}


def _score(weight: torch.Tensor) -> torch.Tensor:
    squares, order = weight.abs().double().square().flatten().sort(descending=True, stable=True)
    score = torch.zeros_like(squares)
    score[order] = squares / squares.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return score.view(weight.shape)
