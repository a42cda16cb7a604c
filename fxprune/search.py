"""Find the masks of a model in four steps: capture, lower, score, select; only this file knows their order.

All arguments are checked before the first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune import sharding
from fxprune.finite import warn_of_strange_parameters
from fxprune.graph import ChannelGraph
from fxprune.latency import LatencyTarget, check_runtime
from fxprune.lowering import Rules
from fxprune.methods import Method, Problem, Weights, new_weights, separate
from fxprune.network import (
    Asker,
    Network,
    adopted,
    build_problem,
    checked,
    inside,
)
from fxprune.paths.used import used_layers
from fxprune.progress import Display
from fxprune.request import (
    GENERAL,
    Exclusion,
    Request,
    blamed_on_data,
    default_sparsity,
    exclusions,
    method_of,
    with_shapes,
)
from fxprune.rewrite import plain
from fxprune.scoring.distributed import everybody
from fxprune.sparsity.budget import Allocation
from fxprune.sparsity.collapse import dead_layers, repair
from fxprune.sparsity.granularity import CHANNEL_OPTIONS, Channel, Granularity
from fxprune.sparsity.granularity import resolve as resolve_granularity
from fxprune.sparsity.group_selection import ChannelGroups, Choice
from fxprune.sparsity.masks import Masks, is_full
from fxprune.sparsity.schedule import DensityFunction, Schedule
from fxprune.timed import find_in_time, is_timed
from fxprune.whole_models import captured_or_called

__all__ = ["Found", "ask", "known_masks", "search"]

LISTED = 20
"""Collapsed layers that a message names; the report names them all."""


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the options called ``names`` out of ``options``, and return them."""
    return {name: options.pop(name) for name in names if name in options}


def ask(
    model: nn.Module,
    method: str | Method,
    sparsity: float | None,
    *,
    budget: Allocation | None = None,
    granularity: str | Granularity = "weight",
    exclude: Exclusion | Iterable[Exclusion] = (),
    data: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    schedule: str | Schedule | DensityFunction | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    returns: str = "graph",
    on_collapse: str = "warn",
    rules: Rules | None = None,
    **method_options: Any,
) -> Request:
    """Check the arguments of :func:`apply`, and hold them as a request."""
    general, channels = _taken(method_options, GENERAL), _taken(method_options, CHANNEL_OPTIONS)
    network, grain = inside(model), resolve_granularity(granularity, **channels)
    wish = Request(
        method_of(method, method_options), default_sparsity(grain) if sparsity is None else sparsity, data,
        loss_fn, "global" if budget is None else budget, grain, schedule, exclusions(exclude), seed, device,
        returns, on_collapse, rules=rules, asked=sparsity is not None, **general,
    )  # fmt: skip
    wish.check(network)
    sharding.check(network, wish)
    if isinstance(grain, Channel):
        check_runtime(grain.runtime)
    return wish


Found = tuple[Network, Problem, Masks, Weights, LatencyTarget | None]
"""The network, the problem, the masks and new weights that were found, and the times, if asked for."""


def search(
    given: nn.Module, example_inputs: Any, wish: Request, display: Display, seen: list[Choice] | None = None
) -> Found:
    """Capture, lower, score and select; ``seen`` notes what channel groups are chosen by."""
    given = adopted(given, wish.returns)
    model = inside(given)
    inputs, wish = with_shapes(model, example_inputs, wish)
    with blamed_on_data(model, example_inputs, wish):
        asker = Asker(wish.method.name, wish.method.needs)
        network, wish = captured_or_called(given, plain(model), inputs, wish, asker, display)
    warn_of_strange_parameters(model, "look for what made them so, before anything is pruned", stacklevel=3)
    before = network.before
    asked = build_problem(network, wish, display, everybody())
    if seen is not None and isinstance(asked.granularity, ChannelGroups):
        asked = replace(asked, granularity=replace(asked.granularity, seen=seen))
    # A method scores and selects.
    with sharding.asked(asked, model, wish.method) as question:
        problem = question.problem
        question.masks, weights, time = _masks(network, problem, wish)
    with display.step(f"look for layers without a path (on_collapse={wish.on_collapse!r})"):
        masks = question.masks
        if network.is_lowered:
            masks = _without_collapse(problem, masks, before, wish)
    return network, problem, masks, weights, time


def _masks(network: Network, problem: Problem, wish: Request) -> tuple[Masks, Weights, LatencyTarget | None]:
    """Find masks by the method, and new weights; under ``of="latency"`` until the time is right."""
    rounds: list[tuple[Masks, Weights]] = []

    def find(problem: Problem) -> Masks:
        found, values = separate(wish.method.find(problem))
        masks = checked(wish.method, found, problem)
        rounds.append((masks, new_weights(wish.method, values, masks, problem)))
        return masks

    masks, time = find_in_time(network, problem, wish, find) if is_timed(problem) else (find(problem), None)
    # The masks of the best round come with the weights of that round, which need not be the last.
    return masks, next(weights for of_round, weights in rounds if of_round is masks), time


def _without_collapse(problem: Problem, masks: Masks, before: Masks, wish: Request) -> Masks:
    """Repair collapsed layers, or raise or warn of them by name, as ``on_collapse`` says."""
    if all(map(is_full, masks.values())):
        return masks
    others = {name: mask.to(problem.device) for name, mask in before.items() if name not in masks}
    dead = _dead(problem.graph, {**others, **masks})
    if dead and wish.on_collapse == "repair":
        masks = repair(
            problem.graph,
            masks,
            problem.weights,
            problem.budget,
            within=problem.masks,
            fixed=others,
            granularity=problem.granularity,
        )
        dead = _dead(problem.graph, {**others, **masks})
    if not dead:
        return masks
    where = ", ".join(dead[:LISTED]) + (f" and {len(dead) - LISTED} more" if len(dead) > LISTED else "")
    lost = "no path is left at all" if len(dead) == len(problem.graph.kernels) else "no path is left through"
    message = (
        f"layer collapse: method {wish.method.name!r} at sparsity {wish.sparsity}: {lost}: {where}; "
        "lower the sparsity, take another method or budget, or on_collapse='repair'"
    )
    if wish.on_collapse == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=4)  # the line that called apply
    return masks


def _dead(graph: ChannelGraph, masks: Masks) -> tuple[str, ...]:
    return dead_layers(graph, used_layers(graph, known_masks(graph, masks)))


def known_masks(graph: ChannelGraph, masks: Masks) -> Masks:
    """The masks of parameters that the graph has kernels of; users may mask others, and they stay masked."""
    return {name: mask for name, mask in masks.items() if name in graph.kernels}
