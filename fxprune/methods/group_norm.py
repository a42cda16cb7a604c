"""Group norm: the length of all weights that go with a channel, relative to its layer's other channels."""

from __future__ import annotations

from dataclasses import replace

from fxprune.scoring.complex_weights import squared
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks


def group_norm() -> Method:
    """Norms of channel groups (DepGraph: Fang, Ma, Song, Mi, Wang 2023, arXiv 2301.12900).

    Score of a weight: ``w^2``. With ``granularity="channel"`` the score of a group is the sum over its rows
    and columns (eq. 4), divided by the mean over the groups of its family, so that neither the number of its
    weights nor the scale of its layers decides. With any other granularity, magnitude pruning. Needs nothing.

    Cost: one pass over all weights.
    When: after training, for channels, without data; after `fxprune.regularizer` with the same norm.
    """
    scored = from_scores(_squares, name="group-norm")

    def find(problem: Problem) -> Masks:
        grain = problem.granularity
        if isinstance(grain, ChannelGroups):
            options = replace(grain.options, pool="sum", normalize="family")
            problem = replace(problem, granularity=replace(grain, options=options))
        return scored(problem)

    return Method(
        name="group-norm",
        find=find,
        summary="keeps the channels whose groups of weights are longest in their family",
        paper="Fang et al. 2023, arXiv 2301.12900",
        reads_only=True,
    )


def _squares(problem: Problem, masks: Masks) -> Scores:
    return {name: squared(weight) for name, weight in problem.weights.items()}
