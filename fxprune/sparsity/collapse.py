"""Layer collapse: masks come in; the layers that lie on no path any more, or repaired masks, go out.

A layer has collapsed when none of its weights lies on a path from input to output, although one would if
nothing were pruned. ``repair`` gives every such layer a path again and spends no more weights than before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fxprune.graph import ChannelGraph
from fxprune.graph.traverse import flow, reach
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import WEIGHT, Granularity
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select

Resolution = Literal["spatial", "channel"]

_RESOLUTIONS: tuple[Resolution, ...] = ("channel", "spatial")
_BOOSTS = (1.0, 1e10, 1e10)
_TRIES = 16


def live_layers(effective: Mapping[str, torch.Tensor]) -> set[str]:
    """The parameters with any weight marked in ``effective``, which is what ``reach`` returns."""
    return {name for name, number in kept(effective).items() if number}


def dead_layers(
    graph: ChannelGraph, effective: Mapping[str, torch.Tensor], resolution: Resolution = "spatial"
) -> tuple[str, ...]:
    """The parameters without an effective weight that would have one in the dense network, in its order."""
    without = graph.kernels.keys() - live_layers(effective)
    if not without:
        return ()
    ever = live_layers(reach(graph, {}, resolution=resolution))
    return tuple(name for name in graph.kernels if name in without and name in ever)


def repair(
    graph: ChannelGraph,
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    within: Mapping[str, torch.Tensor],
    fixed: Mapping[str, torch.Tensor] | None = None,
    granularity: Granularity = WEIGHT,
) -> Masks:
    """Masks of the same ``budget`` under which every layer lies on a path that can lie on one.

    A small *skeleton* of weights is found first, in which every layer lies on a path; it prefers weights that
    ``masks`` keep, then large ones. The rest of the budget goes to what ``masks`` keep: effective weights
    before those on no path, large before small within a layer.

    Args:
        graph: the network.
        masks: the masks to repair, of the prunable parameters.
        weights: their values.
        budget: how many weights to keep; it is met as exactly as ``granularity`` allows.
        within: only these weights may be kept.
        fixed: masks of parameters that are not to be touched (dense where missing).
        granularity: what is kept or dropped together.

    Raises:
        RuntimeError: the skeleton does not fit the budget or the granularity; the message says how many
            weights it takes.
    """
    open_to = {name: mask & _may_keep(budget, name) for name, mask in within.items()}
    others = dict(fixed or {})
    wanted = live_layers(reach(graph, {**others, **open_to}))
    left: set[str] = set()
    # The search asks for paths hundreds of times, so it collapses positions; borders are checked after it.
    for resolution in _RESOLUTIONS:
        skeleton = _Skeleton(graph, dict(masks), dict(weights), open_to, others, resolution)
        chosen = skeleton.build([name for name in graph.kernels if name in wanted])
        _check_fits(chosen, budget)
        together = {name: chosen[name] | mask for name, mask in masks.items()}
        scores = _scores(masks, chosen, reach(graph, {**others, **together}), weights)
        repaired = select(scores, budget, within=open_to, granularity=granularity, method="repair")
        left = wanted - live_layers(reach(graph, {**others, **repaired}))
        if not left:
            return repaired
    raise RuntimeError(
        f"on_collapse='repair': {', '.join(sorted(left))} cannot live on {budget.total} weights under "
        f"{granularity}; ask for a lower sparsity"
    )


def _scores(
    masks: Mapping[str, torch.Tensor],
    skeleton: Mapping[str, torch.Tensor],
    effective: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Skeleton weights first, then kept ones on a path, then kept ones, then the rest; large before small."""
    top = 8.0 * (1 + sum(mask.numel() for mask in masks.values()))  # outweighs all others in any group
    return {
        name: skeleton[name] * top
        + (mask & effective[name]) * 2.0
        + mask * 2.0
        + _relative(weights[name]).double()
        for name, mask in masks.items()
    }


def _may_keep(budget: Budget, name: str) -> bool:
    """Whether the caller wants anything kept in this parameter."""
    return budget.layers is None or budget.layers[name] > 0


def _check_fits(skeleton: Masks, budget: Budget) -> None:
    need = kept(skeleton)
    if sum(need.values()) > budget.total:
        raise RuntimeError(
            f"on_collapse='repair': to keep every layer on a path takes {sum(need.values())} weights or so, "
            f"{budget.total} are to be kept; ask for a lower sparsity"
        )
    for name, number in (budget.layers or {}).items():
        if need[name] > number:
            raise RuntimeError(
                f"on_collapse='repair': to keep every layer on a path takes {need[name]} weights in "
                f"{name!r}, {number} are to be kept there; give it a lower sparsity"
            )


def _relative(weight: torch.Tensor) -> torch.Tensor:
    """|w| over the largest in its layer: 0 to 1, whatever the layer's scale."""
    size = weight.detach().abs().float()
    return size / size.max().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass
class _Skeleton:
    """The search for few weights that put every layer on a path.

    Throughout, some layers are *hard* (only skeleton weights exist) and the others *soft* (whatever may be
    kept exists). Making a layer hard may cut the layer that is to live; then its best weight joins the
    skeleton first. When all layers are hard, the skeleton alone keeps it alive.
    """

    graph: ChannelGraph
    masks: Masks
    weights: dict[str, torch.Tensor]
    within: Masks
    fixed: Masks
    resolution: Resolution
    chosen: Masks = field(init=False)

    def __post_init__(self) -> None:
        self.chosen = {name: torch.zeros_like(mask) for name, mask in self.masks.items()}

    def build(self, layers: list[str]) -> Masks:
        """The skeleton for ``layers``."""
        for name in layers:
            if not self._alive(name, set(self.masks)):
                self._extend(name)
        return self.chosen

    def _extend(self, name: str) -> None:
        """Adds a path through the layer ``name``."""
        layers = list(self.graph.kernels)
        where = {layer: index for index, layer in enumerate(layers)}
        # Neighbours first: they are where something is missing, and the rest can then be taken in long runs.
        waiting = sorted(self.masks, key=lambda other: abs(where[other] - where[name]))
        hard: set[str] = set()
        run = 1
        while waiting:
            if self._alive(name, hard | set(waiting[:run])):
                hard |= set(waiting[:run])
                del waiting[:run]
                run *= 2
            elif run > 1:
                run //= 2
            else:
                self._choose(waiting[0], name, hard)
                hard.add(waiting.pop(0))

    def _state(self, hard: set[str]) -> Masks:
        soft = {name: self.chosen[name] if name in hard else mask for name, mask in self.within.items()}
        return {**self.fixed, **soft}

    def _alive(self, name: str, hard: set[str]) -> bool:
        return bool(reach(self.graph, self._state(hard), resolution=self.resolution)[name].any())

    def _choose(self, layer: str, through: str, hard: set[str]) -> None:
        """Adds the weight of ``layer`` that lies on the best paths through the layer ``through``."""
        edges = {
            name: mask.float() if name in hard or name not in self.masks else self._soft(name, mask)
            for name, mask in self._state(hard).items()
        }
        kernels = self.graph.kernels[through]
        edges.setdefault(through, torch.ones(kernels.shape, device=self.masks[layer].device))
        # Paths beside ``through`` must not count: its own are made heavier until they are all that matters.
        for boost in _BOOSTS:
            edges[through] = edges[through] * boost
            found = flow(self.graph, edges, resolution=self.resolution).gradients
            if float((found[through] * edges[through]).sum()) > 0.9:
                break
        share = (found[layer] * edges[layer]).flatten()
        chosen = self.chosen[layer].view(-1)
        for index in share.topk(min(_TRIES, share.numel())).indices.tolist():
            chosen[index] = True
            if self._alive(through, hard | {layer}):
                return
            chosen[index] = False
        chosen |= self.within[layer].flatten()  # no single weight will do

    def _soft(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """Edge weights that make kept weights far better than pruned ones, and large ones a little better."""
        size = (1 + _relative(self.weights[name])) / 2
        return mask * size * torch.where(self.chosen[name], 1e2, torch.where(self.masks[name], 1.0, 1e-6))
