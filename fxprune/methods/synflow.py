"""SynFlow: keeps the weights that carry the most synaptic flow, in many small rounds, without data."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.graph.traverse import flow
from fxprune.methods._contract import Method, Problem, Scores, prune_in_rounds
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential


def synflow(*, rounds: int = 100, resolution: Literal["spatial", "channel"] = "spatial") -> Method:
    """Synaptic flow (Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467).

    Score: ``|w| * d ln R / d|w|``, with R the sum of the outputs that the network gives for an all-ones input
    with weights |w| * m, without biases, norms and activations; average pooling averages, as in the original.
    ln R instead of R leaves the order as it is and cannot overflow. Needs nothing but shapes.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    Deviations from the authors' code, which runs the network itself: BatchNorm is left out even where it is
    not the identity, so that trained statistics cannot make the flow negative; the count is exact. Where two
    values multiply (attention, gates), R takes the geometric mean of what each carries, so that neither
    starves: the sum of both would let queries and keys, which meet in every channel, displace the values.
    """
    schedule = Exponential(rounds)

    def find(problem: Problem) -> Masks:
        sizes = {name: weight.abs().float() for name, weight in problem.weights.items()}
        # Layers that are not to be pruned carry flow all the same.
        others = {
            name: problem.model.get_parameter(name).detach().abs().float().to(problem.device)
            for name in problem.graph.kernels
            if name not in sizes
        }
        alive = {name: torch.empty_like(size) for name, size in sizes.items()}  # reused in every round

        def carried(_: Problem, masks: Masks) -> Scores:
            for name, size in sizes.items():
                torch.mul(size, masks[name], out=alive[name])
            gradients = flow(
                problem.graph, alive | others, resolution=resolution, pool="mean", products="mean"
            ).gradients
            return {name: gradients[name] * size for name, size in alive.items()}

        return prune_in_rounds(problem, carried, schedule=schedule, regrow=False, name="synflow")

    return Method(
        name="synflow",
        find=find,
        summary="keeps the weights that carry the most synaptic flow; no data",
        paper="Tanaka et al. 2020, arXiv 2006.05467",
    )
