"""OBC: optimal brain surgery weight by weight, exact and greedy, for layers with few inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.scoring.contract import Found, Method, Problem
from fxprune.scoring.gradients import count_of
from fxprune.scoring.layer_plan import Plan, choose_in_layer, solve_in_rounds
from fxprune.scoring.sequential import Layer
from fxprune.scoring.surgeon import check_damp, damped, damping, dense_scores
from fxprune.sparsity.budget import apportion
from fxprune.sparsity.granularity import WEIGHT

NAME = "obc"
CHUNK = 1 << 25
"""Numbers in the inverses that are handled at a time."""


def obc(
    *,
    batches: int = 1,
    damp: float | None = None,
    most: int = 1024,
    propagate: bool = True,
    checkpoint_dir: str | None = None,
) -> Method:
    """Optimal brain compression (Frantar, Singh, Alistarh 2022, arXiv 2208.11580).

    From every output the weight with the least ``w^2 / [H^-1]_jj`` goes, all others change by
    ``-w / [H^-1]_jj * H^-1_j``, and again (algorithms 1 and 2); outputs of a layer are traced to the end, and
    the cheapest steps of all are taken. Needs data. Time grows with the cube of a layer's inputs.

    Options:
        batches: number of batches that are run
        damp: added to the diagonal of the inputs' moments, as a share of its mean; None, for 10 / sqrt(rows)
            of a layer with so many vectors of inputs in the data, and at least 0.01
        most: inputs that a layer may have; beyond it, `sparsegpt` is the method to take
        propagate: whether a layer sees what the pruned layers before it give, instead of the dense ones
        checkpoint_dir: a folder that keeps solved layers; after a kill the same call goes on at the next

    Under a granularity other than weights masks are chosen by the scores of the dense layer, and the weights
    that stay are then the best for them. Under ``budget="global"`` every layer loses the same share.

    Cost: grows with the cube of a layer's inputs, times its outputs.
    When: for pretrained networks with small layers, where `sparsegpt` is too coarse.
    """
    count_of(NAME, "batches", batches)
    count_of(NAME, "most", most)
    check_damp(NAME, damp)

    def solve(plan: Plan, layer: Layer) -> tuple[Tensor, Tensor]:
        inputs = max((matrix.positions.shape[1] for matrix in layer.matrices), default=0)
        if inputs > most:
            said = f"{layer.name!r} has {inputs} inputs, more than most={most}"
            raise ValueError(f"method {NAME!r}: {said}; take sparsegpt, exclude it, or raise the limit")
        return _solved(layer, plan, damp)

    def find(problem: Problem) -> Found:
        return solve_in_rounds(
            problem,
            solve,
            lambda layer: dense_scores(layer.weight, layer.matrices, layer.unseen, damp),
            batches=batches,
            propagate=propagate,
            method=NAME,
            checkpoint_dir=checkpoint_dir,
            options={"damp": damp},
        )

    return Method(
        name="obc",
        find=find,
        needs=frozenset({"data"}),
        summary="removes weights one by one, and all others make up for each; for small pretrained layers",
        paper="Frantar, Singh & Alistarh 2022, arXiv 2208.11580",
        scored=False,
        updates=True,
    )


@dataclass(frozen=True)
class _Rows:
    """Outputs with the same inputs: (outputs, inputs) places in the parameter, and the inverse Hessian."""

    places: Tensor
    inverse: Tensor


def _solved(layer: Layer, plan: Plan, damp: float | None) -> tuple[Tensor, Tensor]:
    groups = [
        _Rows(places.mT, torch.linalg.inv(moments))
        for matrix in layer.matrices
        for places, moments in zip(
            matrix.positions, damped(matrix.moments, damping(damp, matrix.rows)), strict=True
        )
    ]
    if plan.granularity == WEIGHT and not plan.masks:
        mask = _traced_mask(layer, groups, plan.layers[layer.name])
    else:
        mask = choose_in_layer(plan, layer, dense_scores(layer.weight, layer.matrices, layer.unseen, damp))
    weight, keep = layer.weight.clone().view(-1), mask.reshape(-1)
    for rows in groups:
        for place in rows.places:
            gone = (~keep[place]).nonzero().flatten()
            inner = rows.inverse[gone][:, gone]
            multipliers = torch.linalg.solve(inner, weight[place][gone].unsqueeze(-1))
            weight[place] -= (rows.inverse[:, gone] @ multipliers).squeeze(-1)
    return mask, (weight * keep).view_as(layer.weight)


def _traced_mask(layer: Layer, groups: list[_Rows], number: int) -> Tensor:
    """The mask that is left when the cheapest steps of all outputs are taken."""
    mask = layer.mask.clone().view(-1)
    seen = sum(rows.places.numel() for rows in groups)
    rest = layer.unseen
    room = {"seen": int(mask.sum()) - int(mask[rest].sum()), "rest": int(mask[rest].sum())}
    shares = {name: max(float(size), 1e-6) for name, size in room.items()}
    left = apportion(number, shares, room)
    orders, costs = [], []
    for rows in groups:
        step = max(1, CHUNK // rows.inverse.numel())
        for places in torch.split(rows.places, step):
            order, cost = _trace(layer.weight.view(-1)[places], rows.inverse, mask[places])
            orders.append(places.gather(1, order))
            costs.append(cost)
    if groups:
        order = torch.cat([one.flatten() for one in orders])
        cheapest = torch.cat([one.flatten() for one in costs]).argsort(stable=True)
        mask[order[cheapest[: seen - left["seen"]]]] = False
    if len(rest):
        sizes = layer.weight.view(-1)[rest].abs().masked_fill(~mask[rest], -1.0)
        mask[rest[sizes.argsort(stable=True)[: len(rest) - left["rest"]]]] = False
    return mask.view_as(layer.mask)


def _trace(weights: Tensor, inverse: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Remove all weights of every output, the cheapest first; return their order and costs.

    Costs never fall along an output, so that the cheapest steps of all are the first of each. What is pruned
    already goes first.
    """
    weights, number = weights.clone(), len(weights)
    own = inverse.expand(number, -1, -1).clone()
    every = torch.arange(number, device=weights.device)
    gone = torch.zeros_like(within)
    order, costs = torch.empty_like(weights, dtype=torch.int64), torch.empty_like(weights)
    for step in range(weights.shape[1]):
        diagonal = own.diagonal(dim1=-2, dim2=-1)
        scores = (weights.square() / diagonal).masked_fill(~within, -1.0).masked_fill(gone, torch.inf)
        j = scores.argmin(1)
        order[:, step], costs[:, step] = j, scores[every, j]
        column, pivot = own[every, j], diagonal[every, j]
        weights -= (weights[every, j] / pivot).unsqueeze(1) * column
        own -= column.unsqueeze(2) * (column / pivot.unsqueeze(1)).unsqueeze(1)
        gone[every, j] = True
    return order, costs.cummax(1).values
