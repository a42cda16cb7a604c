"""Find layers that lie on no path any more, and repair masks so that every layer lies on one.

A layer has collapsed when none of its weights lies on a path from input to output, although one would if
nothing were pruned. ``repair`` gives every such layer a path again and spends no more weights than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from fxprune.graph import ChannelGraph
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow, reach
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import WEIGHT, Granularity
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select

Resolution = Literal["spatial", "channel"]

_BOOSTS = (1.0, 1e10, 1e10)
CHOSEN = 128.0
"""How much better an entry of the skeleton is than others of its layer; exact to multiply by and divide."""
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
    """Change masks so that, within the same ``budget``, every layer that can lie on a path does.

    A weight for every layer that lies on no path is tried first, which joins it to what ``masks`` keep. Where
    the rest then cannot spare that many, a small *skeleton* of weights is found, in which every layer lies on
    a path by itself. Both prefer weights that ``masks`` keep, then large ones. The rest of the budget goes to
    what ``masks`` keep: effective weights before those on no path, large before small within a layer.

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
    for chosen in _plans(graph, masks, weights, open_to, others, [n for n in graph.kernels if n in wanted]):
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


def _plans(
    graph: ChannelGraph,
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    within: Masks,
    fixed: Masks,
    wanted: list[str],
) -> Iterator[Masks]:
    """Weights to keep before all others, from the cheapest guess to the most thorough search."""
    found = circuit(graph)
    # The searches ask for paths hundreds of times: they collapse positions, and borders are checked after it.
    # Where kernels are as good as weights for that, they ask the circuit, which is a hundred times faster.
    first: _Reading = _OnWeights(graph, "channel") if found is None else _OnKernels(graph, found)
    sizes = _sizes(weights)
    bridges = _Skeleton(graph, first, dict(masks), sizes, within, fixed).bridge(wanted)
    if bridges is not None:
        yield bridges
    for reading in (first, _OnWeights(graph, "spatial")):
        yield _Skeleton(graph, reading, dict(masks), sizes, within, fixed).build(wanted)


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


def _sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (1 + _relative(weight)) / 2 for name, weight in weights.items()}


class _Reading(Protocol):
    """Describe how the search sees the network: in entries (weights or kernels) of type ``dtype``."""

    @property
    def dtype(self) -> torch.dtype: ...

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        """The best of the weights in each entry."""

    def weights(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The best weight of each marked entry, by ``values``: bool, shaped as these."""

    def slope(self, edges: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """d ln R / d edge for the entries of ``name``; zero everywhere without a path."""

    def alive(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        """Whether any entry of ``name`` lies on a path."""


@dataclass(frozen=True)
class _OnWeights:
    graph: ChannelGraph
    resolution: Resolution
    dtype: torch.dtype = torch.float64

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def weights(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return entries

    def slope(self, edges: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return flow(self.graph, edges, resolution=self.resolution).gradients[name]

    def alive(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        masks = {key: edge > 0 for key, edge in edges.items()}
        return bool(reach(self.graph, masks, resolution=self.resolution)[name].any())


@dataclass(frozen=True)
class _OnKernels:
    graph: ChannelGraph
    circuit: Circuit

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        return values.flatten(2).amax(2) if values.dim() > 2 else values

    def weights(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if values.dim() == 2:
            return entries
        flat = values.flatten(2)
        taps = torch.zeros_like(flat, dtype=torch.bool).scatter_(2, flat.argmax(2, keepdim=True), True)
        return (taps & entries.unsqueeze(2)).view(values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.circuit.dtype

    def slope(self, edges: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return self._spread(self.circuit.run(edges), edges[name], name)

    def alive(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        return bool((self._spread(self.circuit.on_paths(edges), edges[name], name) * edges[name] > 0).any())

    def _spread(self, found: Pass, like: torch.Tensor, name: str) -> torch.Tensor:
        """The sum over all uses of ``name`` of its outputs' slopes times what arrives at its inputs."""
        slope = torch.zeros_like(like)
        for place, op in enumerate(self.circuit.contractions):
            if op.name == name:
                op.spread(found.slope[place], found.x[place], slope, add=True)
        return slope


@dataclass
class _Skeleton:
    """The search for few weights that put every layer on a path.

    Throughout, some layers are *hard* (only skeleton weights exist) and the others *soft* (whatever may be
    kept exists). Making a layer hard may cut the layer that is to live; then its best weight joins the
    skeleton first. When all layers are hard, the skeleton alone keeps it alive.
    """

    graph: ChannelGraph
    reading: _Reading
    masks: Masks
    sizes: dict[str, torch.Tensor]
    within: Masks
    fixed: Masks
    soft: dict[str, torch.Tensor] = field(init=False)
    hard: dict[str, torch.Tensor] = field(init=False)
    fixed_entries: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # What is kept is far better than what is pruned, and what is large a little better. What an entry
        # counts while its layer is soft, and while it is hard, is kept up to date: runs are many.
        self.soft = {
            name: self.reading.entries(self._worth(name)).to("cpu", self.reading.dtype) for name in self.masks
        }
        self.hard = {name: torch.zeros_like(soft) for name, soft in self.soft.items()}
        others = {
            name: self.fixed.get(name, torch.ones(kernels.shape))
            for name, kernels in self.graph.kernels.items()
            if name not in self.masks
        }
        self.fixed_entries = {
            name: self.reading.entries(mask.to("cpu", self.reading.dtype)) for name, mask in others.items()
        }

    def _worth(self, name: str) -> torch.Tensor:
        live = self.graph.kernels[name].live_taps.to(self.within[name].device)
        may = self.within[name] & live.expand(self.graph.kernels[name].shape)
        return may * self.sizes[name] * torch.where(self.masks[name], 1.0, 1e-6)

    def bridge(self, layers: list[str]) -> Masks | None:
        """One weight for each of ``layers`` that has no path under the masks, if that is enough for paths.

        Other layers are what the masks leave of them; layers without a path are soft, until one weight of
        them is taken, in the order of execution.
        """
        kept = {
            name: soft * (self.reading.entries(self.masks[name].to(soft)) > 0)
            for name, soft in self.soft.items()
        }
        edges = self.fixed_entries | kept
        dead = [name for name in layers if name in self.masks and not self.reading.alive(edges, name)]
        edges |= {name: self.soft[name] for name in dead}
        for name in dead:
            share = self.reading.slope(edges, name).cpu() * edges[name]
            if not float(share.max()) > 0:
                return None
            best = share.flatten().argmax()
            self._put(name, best, True)
            edges[name] = kept[name] + self.hard[name]
        return self._weights()

    def build(self, layers: list[str]) -> Masks:
        """The skeleton for ``layers``."""
        for name in layers:
            if not self._alive(name, set(self.masks)):
                self._extend(name)
        return self._weights()

    def _weights(self) -> Masks:
        return {
            name: self.reading.weights((chosen > 0).to(self.masks[name].device), self._worth(name))
            for name, chosen in self.hard.items()
        }

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

    def _edges(self, hard: set[str]) -> dict[str, torch.Tensor]:
        """Weigh each entry: in hard layers only what is chosen exists, and it is far better."""
        return self.fixed_entries | {
            name: self.hard[name] if name in hard else soft for name, soft in self.soft.items()
        }

    def _put(self, layer: str, entries: torch.Tensor, chosen: bool) -> None:
        """Takes entries of ``layer`` (flat indices) into the skeleton, or out of it."""
        self.hard[layer].view(-1)[entries] = float(chosen)
        self.soft[layer].view(-1)[entries] *= CHOSEN if chosen else 1 / CHOSEN

    def _alive(self, name: str, hard: set[str]) -> bool:
        return self.reading.alive(self._edges(hard), name)

    def _choose(self, layer: str, through: str, hard: set[str]) -> None:
        """Adds the entry of ``layer`` that lies on the best paths through the layer ``through``."""
        edges = self._edges(hard)
        # Paths beside ``through`` must not count: its own are made heavier until they are all that matters.
        for boost in _BOOSTS:
            edges[through] = edges[through] * boost
            if float((self.reading.slope(edges, through).cpu() * edges[through]).sum()) > 0.9:
                break
        share = (self.reading.slope(edges, layer).cpu() * edges[layer]).flatten()
        fresh = self.hard[layer].view(-1) == 0
        for index in share.topk(min(_TRIES, share.numel())).indices:
            if not fresh[index]:
                continue
            self._put(layer, index, True)
            if self._alive(through, hard | {layer}):
                return
            self._put(layer, index, False)
        self._put(
            layer, ((self.soft[layer].view(-1) > 0) & fresh).nonzero().flatten(), True
        )  # no one will do
