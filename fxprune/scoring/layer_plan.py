"""Plan how many weights every layer keeps, for methods that solve them one by one; choose in one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.scoring.complex_weights import refuse_complex
from fxprune.scoring.contract import Found, Problem, Weights, round_budgets, select_within
from fxprune.scoring.distributed import agree
from fxprune.scoring.sequential import Layer, solve_layers
from fxprune.scoring.solved import SolvedLayers
from fxprune.sparsity.budget import Budget, apportion
from fxprune.sparsity.granularity import Granularity
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.schedule import OneShot
from fxprune.sparsity.select import select

__all__ = ["Plan", "Split", "choose_in_layer", "output_energy", "plan_layers", "solve_in_rounds"]

LayerScores = Callable[[Layer], Tensor]
"""The scores of a layer's weights, in their shape; higher = keep."""

Split = Literal["equal", "error"]
"""How layers share a budget that names none of them."""


@dataclass(frozen=True)
class Plan:
    """Hold the number of weights that each layer keeps, or, for channels, the masks of all.

    ``layers``: name -> number, where masks are chosen layer by layer; ``masks``: where they are ahead.
    """

    granularity: Granularity
    layers: dict[str, int] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)


def solve_in_rounds(
    problem: Problem,
    solver: Callable[[Plan, Layer], tuple[Tensor, Tensor]],
    scores: LayerScores,
    *,
    batches: int,
    propagate: bool,
    method: str,
    split: Split = "equal",
    checkpoint_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Found:
    """Plan and solve all layers, once, or in the rounds of ``problem.schedule``, each from the one before it.

    ``solver`` gets the plan and a layer; ``scores`` are those that channels are chosen by, and the squared
    errors by which layers share a budget under ``split="error"``. ``checkpoint_dir``: where solved layers
    are kept, with the method's ``options``. The others are the arguments of
    :func:`fxprune.scoring.sequential.solve_layers`.
    """
    refuse_complex(problem, method)
    masks, weights = dict(problem.masks), dict[str, Tensor]()
    budgets = list(round_budgets(problem, schedule=OneShot(), regrow=False, name=method))
    for number, budget in enumerate(budgets):
        now = replace(problem, masks=masks, budget=budget.capped(problem.granularity.room(masks)))
        common: dict[str, Any] = {"batches": batches, "method": method, "start": weights}
        plan = plan_layers(now, scores, split=split, **common)
        solved = None
        if checkpoint_dir is not None:
            facts = {**(options or {}), "batches": batches, "propagate": propagate, **_facts(now, plan)}
            folder = os.path.join(checkpoint_dir, f"{method}-round-{number}")
            solved = SolvedLayers(folder, facts, problem.group)
        masks, weights = solve_layers(
            now, partial(solver, plan), propagate=propagate, solved=solved, **common
        )
        if problem.group is not None:
            agree(masks, problem.group)
    return (masks, weights) if weights else masks


def _facts(problem: Problem, plan: Plan) -> dict[str, Any]:
    """All that decides how layers are solved, besides data and options, as JSON values."""
    weights = {
        name: [list(weight.shape), float(weight.double().sum()), float(weight.double().square().sum())]
        for name, weight in problem.weights.items()
    }
    masks = {**kept(problem.masks)} if not plan.masks else {**kept(plan.masks)}
    return {"weights": weights, "masks": masks, "budget": plan.layers, "granularity": repr(plan.granularity)}


def plan_layers(
    problem: Problem,
    scores: LayerScores,
    *,
    batches: int,
    method: str,
    start: Weights | None = None,
    split: Split = "equal",
) -> Plan:
    """Plan the layers of a problem.

    A budget without layers is split so that every layer loses the same share of what it has, or, by "error",
    as weights would share it that compete over the network by their scores relative to the energy of their
    layer's outputs. Channels run through several layers: they are chosen here, by ``scores`` of all layers in
    the dense network.

    The arguments are those of :func:`solve_in_rounds`.
    """
    dense = partial(_scores_of_all, problem, batches=batches, method=method, start=start)
    if isinstance(problem.granularity, ChannelGroups):
        masks = select_within(problem, dense(scores), problem.budget, problem.masks, method)
        return Plan(problem.granularity, masks=masks)
    room = problem.granularity.room(problem.masks)
    layers = problem.budget.layers
    if layers is None and split == "error":
        relative = dense(lambda layer: scores(layer) / output_energy(layer))
        layers = kept(select_within(problem, relative, problem.budget, problem.masks, method))
    if layers is None:
        shares = {name: float(max(number, 1)) for name, number in kept(problem.masks).items()}
        layers = apportion(min(problem.budget.total, sum(room.values())), shares, room)
    return Plan(problem.granularity, {name: min(number, room[name]) for name, number in layers.items()})


def _scores_of_all(
    problem: Problem, scores: LayerScores, *, batches: int, method: str, start: Weights | None
) -> dict[str, Tensor]:
    """The scores of all layers, on the inputs that the dense network gives them."""
    found: dict[str, Tensor] = {}

    def note(layer: Layer) -> tuple[Tensor, Tensor]:
        found[layer.name] = scores(layer).to(problem.weights[layer.name].device)
        return layer.mask, layer.weight

    solve_layers(problem, note, batches=batches, propagate=False, method=method, start=start, silent=True)
    return {name: found[name] for name in problem.weights}


def output_energy(layer: Layer) -> float:
    """Sum the squares of a layer's outputs, without biases, over the data; never 0.

    Weights without inputs count as if their inputs were as large as those of the others on average.
    """
    weight = layer.weight.reshape(-1)
    energy, seen = 0.0, 0.0
    for matrix in layer.matrices:
        values = weight[matrix.positions]
        energy += float((values * (matrix.moments @ values)).sum())
        seen += float(values.square().sum())
    unseen = float(weight[layer.unseen].square().sum())
    energy += unseen * (energy / seen if seen else 1.0)
    return energy if energy > 0 else 1.0


def choose_in_layer(plan: Plan, layer: Layer, scores: Tensor) -> Tensor:
    """Return the mask of a layer's highest ``scores`` under the plan's granularity, or the planned one."""
    if plan.masks:
        return plan.masks[layer.name].to(layer.weight.device)
    name, number = layer.name, plan.layers[layer.name]
    if not number:
        return torch.zeros_like(layer.mask)
    budget = Budget(number, {name: layer.weight.numel()})
    within = {name: layer.mask}
    return select({name: scores}, budget, within=within, granularity=plan.granularity, method=name)[name]
