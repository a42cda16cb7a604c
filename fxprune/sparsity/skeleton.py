"""Search for a skeleton: few weights that put every layer of a network on a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fxprune.graph import ChannelGraph
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.count import flow, reach
from fxprune.paths.program import Resolution
from fxprune.sparsity.masks import Masks

__all__ = ["KernelPaths", "PathModel", "Skeleton", "WeightPaths"]

CHOSEN = 128.0
"""The factor by which a chosen entry is better than others of its layer; exact to multiply by and divide."""
BOOSTS = (1.0, 1e10, 1e10)
"""Factors by which the edges of a layer are made heavier, one after the other."""
MOST = 0.9
"""The share of all paths that is to go through that layer then."""
TRIES = 16
"""The number of entries that are tried one by one before all are chosen."""


class PathModel(Protocol):
    """The paths of a network, in *entries* of its layers: single weights, or kernels.

    ``edges`` holds by parameter a number for every entry, positive where the entry exists, of type ``dtype``.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        """Return the best of the weights in each entry, by ``values``."""

    def weights(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Mark the best weight of each marked entry, by ``values``: bool, shaped as these."""

    def slope(self, edges: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return d ln R / d edge for the entries of ``name``; zero everywhere without a path."""

    def has_path(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        """Return whether any entry of ``name`` lies on a path."""


@dataclass(frozen=True)
class WeightPaths:
    """A path model whose entries are weights."""

    graph: ChannelGraph
    resolution: Resolution
    dtype: torch.dtype = torch.float64

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def weights(self, entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return entries

    def slope(self, edges: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return flow(self.graph, edges, resolution=self.resolution).gradients[name]

    def has_path(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        masks = {key: edge > 0 for key, edge in edges.items()}
        return bool(reach(self.graph, masks, resolution=self.resolution)[name].any())


@dataclass(frozen=True)
class KernelPaths:
    """A path model whose entries are kernels, read off a compiled circuit."""

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
        return self._sum_over_uses(self.circuit.run(edges), edges[name], name)

    def has_path(self, edges: Mapping[str, torch.Tensor], name: str) -> bool:
        on_paths = self._sum_over_uses(self.circuit.on_paths(edges), edges[name], name)
        return bool((on_paths * edges[name] > 0).any())

    def _sum_over_uses(self, found: Pass, like: torch.Tensor, name: str) -> torch.Tensor:
        """Add up, over the uses of ``name``, the products of output slopes and path counts of inputs."""
        slope = torch.zeros_like(like)
        for place, op in enumerate(self.circuit.contractions):
            if op.name == name:
                op.spread(found.slope[place], found.x[place], slope, add=True)
        return slope


@dataclass
class Skeleton:
    """Search for few weights that put every layer on a path: the *chosen* entries.

    During the search a layer is either *hard*: only its chosen entries exist; or *soft*: every entry that may
    be kept exists. At first all layers are soft. They are made hard one after the other. Where that would cut
    the last path through the layer that is looked at, the best entry of the layer that becomes hard is
    chosen. When all layers are hard, the chosen entries alone make a path.

    ``masks``: what was kept before. ``sizes``: the size of every weight, in (0, 1]. ``within``: what may be
    kept. ``fixed``: masks of the layers that are not searched.
    ``soft``, ``hard``: by layer, the edges that it has while it is soft, and while it is hard. Both are kept
    up to date, since paths are looked for many times. ``fixed_edges``: the edges of all other layers.
    """

    graph: ChannelGraph
    paths: PathModel
    masks: Masks
    sizes: dict[str, torch.Tensor]
    within: Masks
    fixed: Masks
    soft: dict[str, torch.Tensor] = field(init=False)
    hard: dict[str, torch.Tensor] = field(init=False)
    fixed_edges: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.soft = {
            name: self.paths.entries(self._values(name)).to("cpu", self.paths.dtype) for name in self.masks
        }
        self.hard = {name: torch.zeros_like(soft) for name, soft in self.soft.items()}
        others = {
            name: self.fixed.get(name, torch.ones(kernels.shape))
            for name, kernels in self.graph.kernels.items()
            if name not in self.masks
        }
        self.fixed_edges = {
            name: self.paths.entries(mask.to("cpu", self.paths.dtype)) for name, mask in others.items()
        }

    def _values(self, name: str) -> torch.Tensor:
        """Value the weights of a layer: kept ones a million times pruned ones, then large before small."""
        live = self.graph.kernels[name].live_taps.to(self.within[name].device)
        may = self.within[name] & live.expand(self.graph.kernels[name].shape)
        return may * self.sizes[name] * torch.where(self.masks[name], 1.0, 1e-6)

    def bridge(self, layers: list[str]) -> Masks | None:
        """Choose one weight for each of ``layers`` that lies on no path; ``None`` if that is not enough.

        Other layers have what the masks leave of them. Layers without a path are soft until one of their
        weights is chosen, in the order of execution.
        """
        kept = {
            name: soft * (self.paths.entries(self.masks[name].to(soft)) > 0)
            for name, soft in self.soft.items()
        }
        edges = self.fixed_edges | kept
        dead = [name for name in layers if name in self.masks and not self.paths.has_path(edges, name)]
        edges |= {name: self.soft[name] for name in dead}
        for name in dead:
            share = self.paths.slope(edges, name).cpu() * edges[name]
            if not float(share.max()) > 0:
                return None
            self._set_chosen(name, share.flatten().argmax(), True)
            edges[name] = kept[name] + self.hard[name]
        return self._chosen_weights()

    def build(self, layers: list[str]) -> Masks:
        """Choose weights that put each of ``layers`` on a path when nothing else is kept."""
        everything = set(self.masks)
        for name in layers:
            if not self._has_path(name, everything):
                self._choose_path_through(name)
        return self._chosen_weights()

    def _chosen_weights(self) -> Masks:
        return {
            name: self.paths.weights((chosen > 0).to(self.masks[name].device), self._values(name))
            for name, chosen in self.hard.items()
        }

    def _choose_path_through(self, name: str) -> None:
        """Make all layers hard, and choose entries where that would leave the layer ``name`` no path.

        Most layers already have the entries that the path needs. So layers are made hard in runs of 1, 2, 4,
        ... as long as a path is left, and in shorter ones where none would be. A run of one layer that leaves
        no path is the layer that needs another entry.
        """
        order = {layer: index for index, layer in enumerate(self.graph.kernels)}
        # Neighbours first: entries are missing near ``name``, and the rest then goes in long runs.
        waiting = sorted(self.masks, key=lambda other: abs(order[other] - order[name]))
        hard: set[str] = set()
        run = 1
        while waiting:
            if self._has_path(name, hard | set(waiting[:run])):
                hard |= set(waiting[:run])
                del waiting[:run]
                run *= 2
            elif run > 1:
                run //= 2
            else:
                self._choose_entry(waiting[0], name, hard)
                hard.add(waiting.pop(0))

    def _edges(self, hard: set[str]) -> dict[str, torch.Tensor]:
        """Return the edges of all layers while those of ``hard`` are hard and the others soft."""
        return self.fixed_edges | {
            name: self.hard[name] if name in hard else soft for name, soft in self.soft.items()
        }

    def _has_path(self, name: str, hard: set[str]) -> bool:
        return self.paths.has_path(self._edges(hard), name)

    def _set_chosen(self, layer: str, entries: torch.Tensor, chosen: bool) -> None:
        """Choose entries of ``layer`` (flat indices), or take the choice back."""
        self.hard[layer].view(-1)[entries] = float(chosen)
        self.soft[layer].view(-1)[entries] *= CHOSEN if chosen else 1 / CHOSEN

    def _choose_entry(self, layer: str, through: str, hard: set[str]) -> None:
        """Choose the entry of ``layer`` that lies on the best paths through the layer ``through``.

        The best few are tried in turn. If none of them alone leaves a path, all entries are chosen.
        """
        share = self._share_of_paths(layer, through, hard)
        is_open = self.hard[layer].view(-1) == 0
        for index in share.topk(min(TRIES, share.numel())).indices:
            if not is_open[index]:
                continue
            self._set_chosen(layer, index, True)
            if self._has_path(through, hard | {layer}):
                return
            self._set_chosen(layer, index, False)
        rest = (self.soft[layer].view(-1) > 0) & is_open
        self._set_chosen(layer, rest.nonzero().flatten(), True)

    def _share_of_paths(self, layer: str, through: str, hard: set[str]) -> torch.Tensor:
        """Return the share that each entry of ``layer`` has in the paths through the layer ``through``.

        Paths beside ``through`` must not count: its edges are made heavier until nearly all paths, by weight,
        go through it.
        """
        edges = self._edges(hard)
        for boost in BOOSTS:
            edges[through] = edges[through] * boost
            if float((self.paths.slope(edges, through).cpu() * edges[through]).sum()) > MOST:
                break
        return (self.paths.slope(edges, layer).cpu() * edges[layer]).flatten()
