"""Magnitude pruning: the smallest weights go. A baseline at initialisation, strong after training."""

from __future__ import annotations

from fxprune.scoring.contract import Method, Problem, Scores, by_family, from_scores
from fxprune.sparsity.masks import Masks


def magnitude() -> Method:
    """Keeps the largest weights.

    Score: |w|, of the weights as they are given, so that more rounds give the same masks. Needs nothing.
    Weights compete across layers under ``budget="global"``, which starves wide layers at initialisation;
    ``"uniform"`` compares within layers (Han et al. 2015, arXiv 1506.02626).

    Cost: one comparison of all weights.
    When: after training, before fine-tuning; the baseline that any other method has to beat.
    """
    return Method(
        name="magnitude",
        find=by_family(from_scores(_magnitudes, name="magnitude")),
        summary="keeps the largest weights",
        paper="Han et al. 2015, arXiv 1506.02626",
        shards="rows",
        reads_only=True,
    )


def _magnitudes(problem: Problem, masks: Masks) -> Scores:
    return {name: weight.abs() for name, weight in problem.weights.items()}
