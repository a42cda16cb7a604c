"""Synaptic flow with other edges than |w|: the loop that the variants of SynFlow share.

A problem comes in, with two functions: what an edge is worth, and what the score of a weight is, given the
flow through the network of such edges. Masks go out, in many small rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fxprune.graph.traverse import flow
from fxprune.methods._contract import Problem, Scores, prune_in_rounds
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential

__all__ = ["in_rounds"]

Edge = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, Tensor, float], Tensor]
"""``score(|w|, d ln R / d edge, ln R)``."""


def in_rounds(
    edge: Edge, score: Score, *, rounds: int, resolution: Literal["spatial", "channel"], name: str
) -> Callable[[Problem], Masks]:
    """A method's ``find``: ``rounds`` rounds under an exponential schedule, or under the problem's own.

    R is the sum of the outputs for an all-ones input with edges ``edge(|w| * m)``, without biases, norms and
    activations; average pooling averages, products take the geometric mean, as in SynFlow. ln R and
    d ln R / d edge are finite for any network.
    """
    schedule = Exponential(rounds)

    def find(problem: Problem) -> Masks:
        sizes = {label: weight.abs().float() for label, weight in problem.weights.items()}
        # Layers that are not to be pruned carry flow all the same.
        others = {
            label: edge(problem.model.get_parameter(label).detach().abs().float().to(problem.device))
            for label in problem.graph.kernels
            if label not in sizes
        }

        def carried(_: Problem, masks: Masks) -> Scores:
            alive = {label: size * masks[label] for label, size in sizes.items()}
            edges = {label: edge(size) for label, size in alive.items()}
            found = flow(problem.graph, edges | others, resolution=resolution, pool="mean", products="mean")
            return {
                label: score(size, found.gradients[label], found.log_total) for label, size in alive.items()
            }

        return prune_in_rounds(problem, carried, schedule=schedule, regrow=False, name=name)

    return find
