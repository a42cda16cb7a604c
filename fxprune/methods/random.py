"""Random pruning: independent uniform noise as score, the baseline of all methods."""

from __future__ import annotations

from fxprune.scoring.contract import Method, Problem, Scores, from_scores, noise
from fxprune.sparsity.masks import Masks


def random() -> Method:
    """Independent noise for every weight; only the split of the budget over layers makes a difference.

    Score: U(0, 1). Needs nothing. With ``budget="erk"`` it is the usual sparse baseline (Liu et al. 2022,
    arXiv 2202.02643), with an exact number of weights in every layer.

    Cost: one comparison of all weights.
    When: the baseline at initialization, with ``budget="erk"``.
    """
    return Method(
        name="random",
        find=from_scores(_uniform, name="random"),
        summary="independent noise for every weight",
        paper="Liu et al. 2022, arXiv 2202.02643",
        shards="rows",
        reads_only=True,
    )


def _uniform(problem: Problem, masks: Masks) -> Scores:
    return {name: noise(problem, name).to(weight.device) for name, weight in problem.weights.items()}
