"""Make a plan: prune as ``apply`` would, change nothing, and say what would go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.channels.cost import count_macs, count_parameters
from fxprune.latency.cost import Latency
from fxprune.methods import Method, Problem
from fxprune.network import Network
from fxprune.plans import Plan, PlannedLayer, TargetPoint, channels_in_words
from fxprune.progress import Display
from fxprune.request import Exclusion, Request
from fxprune.search import ask, search
from fxprune.sparsity.budget import Allocation, Budget, count
from fxprune.sparsity.granularity import Channel, Granularity
from fxprune.sparsity.group_selection import ChannelGroups, Choice
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import DensityFunction, Schedule

__all__ = ["plan"]

POINTS = 10


def plan(
    model: nn.Module,
    method: str | Method = "magnitude",
    sparsity: float | None = None,
    *,
    example_inputs: Any = None,
    data: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    budget: Allocation | None = None,
    granularity: str | Granularity = "channel",
    schedule: str | Schedule | DensityFunction | None = None,
    exclude: Exclusion | Iterable[Exclusion] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> Plan:
    """Say which channels :func:`fxprune.apply` would remove, and what that saves; nothing is changed.

    Args:
        model, method, example_inputs, data, loss_fn, budget, schedule, exclude, seed, device,
            progress, options: as for :func:`fxprune.apply`: ``of="macs"`` and other options of channels, and
            those of the method. Under ``of="latency"`` networks are compacted and measured on the way.
        granularity: "channel" or "head".
        sparsity: 0.5, where no ``at_most`` says what may stay.

    Returns:
        A :class:`Plan`: a table by layer, and ten targets from one scoring. ``fxprune.apply(model, plan)``
        gives what ``apply`` gives for the same arguments.

    Raises:
        TypeError, ValueError: as :func:`fxprune.apply`, and for a granularity without channel groups.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = plan(net, "magnitude", 0.5, of="macs", example_inputs=torch.ones(2, 4), progress=False)
    >>> found.layers[0].outputs, found.cost
    ((8, 4), (48.0, 24.0))
    """
    share = 0.5 if sparsity is None and options.get("at_most") is None else sparsity
    wish = ask(
        model, method, share, data=data, loss_fn=loss_fn, budget=budget, granularity=granularity,
        schedule=schedule, exclude=exclude, seed=seed, device=device, **options,
    )  # fmt: skip
    if not isinstance(wish.granularity, Channel):
        raise ValueError(f"granularity={granularity!r}: a plan is of channels; take 'channel' or 'head'")
    if wish.method.updates:
        raise ValueError(
            f"method={wish.method.name!r}: it changes the weights that stay, which a plan does not hold; "
            "take apply, or another method"
        )
    seen: list[Choice] = []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        network, problem, masks, _, _ = search(model, example_inputs, wish, Display(enabled=progress), seen)
        return _described(network, problem, masks, wish, seen)


def _described(network: Network, problem: Problem, masks: Masks, wish: Request, seen: list[Choice]) -> Plan:
    grain = problem.granularity
    assert isinstance(grain, ChannelGroups)
    groups = grain.groups
    ones = {name: mask.double() for name, mask in masks.items()}
    staying, every = grain.pool(ones, masks)[1], torch.ones(groups.count, dtype=torch.bool)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.captured.named_parameters()}
    macs, parameters = count_macs(groups), count_parameters(groups, shapes)
    cost = grain.cost(problem.masks)
    return Plan(
        method=wish.method.name,
        sparsity=wish.sparsity if grain.options.at_most is None else 1 - (problem.budget.asked or 1.0),
        of=grain.options.of,
        cost=(cost.whole, cost.left(staying)),
        parameters=(parameters.whole, parameters.left(staying)),
        macs=(macs.whole, macs.left(staying)),
        layers=tuple(
            _layer(grain, name, every, staying, macs.whole, cost if isinstance(cost, Latency) else None)
            for name in groups.graph.kernels
        ),
        curve=tuple(_curve(problem.budget, *seen[0])) if seen else (),
        excluded=tuple(name for name in groups.graph.kernels if name not in problem.weights),
        options=asdict(grain.options),
        seed=wish.seed,
    )


def _layer(
    grain: ChannelGroups, name: str, every: Tensor, staying: Tensor, macs: float, times: Latency | None
) -> PlannedLayer:
    """Describe one parameter under the groups that stay."""
    groups = grain.groups
    kernels = groups.graph.kernels[name]
    stays = torch.cat([staying, staying.new_ones(1)])  # -1: what cannot go
    rows, columns = stays[groups.rows[name]], stays[groups.columns[name]]
    whole = kernels.shape.numel()
    left = int(groups.kept(name, staying).sum())
    milliseconds = None
    if times is not None:
        found = [times.of_layer(name, chosen) for chosen in (every, staying)]
        milliseconds = (found[0], found[1])
    return PlannedLayer(
        name,
        (len(rows), int(rows.sum())),
        (len(columns), int(columns.sum())),
        (whole, left),
        (kernels.macs, round(kernels.macs * left / whole)),
        kernels.macs / macs if macs else 0.0,
        milliseconds,
        channels_in_words((~rows).nonzero().flatten().tolist()),
    )


def _curve(
    budget: Budget, grain: ChannelGroups, scores: Mapping[str, Tensor], within: Masks
) -> Iterable[TargetPoint]:
    """Choose groups for ten targets by the same scores, up to the most that can go."""
    cost = grain.cost(within)
    total = sum(float(score.double().abs()[within[name]].sum()) for name, score in scores.items())
    most = grain.most(scores, within)
    for step in range(1, POINTS + 1):
        density = 1 - most * step / POINTS
        weights = max(count(sum(budget.sizes.values()), density), 1)
        target = replace(budget, total=weights, layers=None, asked=density)
        masks = grain.choose(scores, target, within)
        ones = {name: mask.double() for name, mask in masks.items()}
        left = cost.left(grain.pool(ones, masks)[1])
        kept = sum(float(score.double().abs()[masks[name]].sum()) for name, score in scores.items())
        yield TargetPoint(1 - density, left, kept / total if total else 0.0)
