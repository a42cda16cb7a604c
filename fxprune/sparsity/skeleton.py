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
PULL = 1e10
"""The factor by which the edges of a layer are made heavier, at most."""
MOST = 0.9
"""The share of all paths that is to go through that layer then."""
NOISE = 0.01
"""By how much edges differ at random, where one of several is to be taken."""
ROUNDS = 40
"""The number of times that a path is looked for by shares, at most."""
UNSURE = 0.02
"""The share from which an entry may lie on that path, and from which on it does for sure, seen from 1."""
LEAST = 1e-9
"""What is left of an edge that has no share, seen from the largest of its layer."""
TRIES = 16
"""The number of entries that are tried one by one before several are chosen together."""


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

    def slopes(self, edges: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return d ln R / d edge for the entries of every layer; zero everywhere without a path."""

    def living(self, edges: Mapping[str, torch.Tensor]) -> set[str]:
        """Return the layers with an entry that lies on a path."""


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

    def slopes(self, edges: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return flow(self.graph, edges, resolution=self.resolution).gradients

    def living(self, edges: Mapping[str, torch.Tensor]) -> set[str]:
        masks = {key: edge > 0 for key, edge in edges.items()}
        found = reach(self.graph, masks, resolution=self.resolution)
        return {name for name, effective in found.items() if bool(effective.any())}


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

    def slopes(self, edges: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return self._sums_over_uses(self.circuit.run(edges), edges)

    def living(self, edges: Mapping[str, torch.Tensor]) -> set[str]:
        on_paths = self._sums_over_uses(self.circuit.on_paths(edges), edges)
        return {name for name, number in on_paths.items() if bool((number * edges[name] > 0).any())}

    def _sums_over_uses(self, found: Pass, edges: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add up, over the uses of each layer, the products of output slopes and path counts of inputs."""
        slopes = {name: torch.zeros_like(edge) for name, edge in edges.items()}
        for place, op in enumerate(self.circuit.contractions):
            op.spread(found.slope[place], found.x[place], slopes[op.name], add=True)
        return slopes


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
        living = self.paths.living(edges)
        dead = [name for name in layers if name in self.masks and name not in living]
        edges |= {name: self.soft[name] for name in dead}
        for name in dead:
            share = self.paths.slopes(edges)[name].cpu() * edges[name]
            if not float(share.max()) > 0:
                return None
            self._set_chosen(name, share.flatten().argmax(), True)
            edges[name] = kept[name] + self.hard[name]
        return self._chosen_weights()

    def build(self, layers: list[str]) -> Masks:
        """Choose weights that put each of ``layers`` on a path when nothing else is kept."""
        everything = set(self.masks)
        living: set[str] = set()
        for name in layers:
            # More chosen entries cut no path, so that what lived once is not looked for again.
            living = living if name in living else self.paths.living(self._edges(everything))
            if name not in living:
                self._choose_whole_path(name)
                living = self.paths.living(self._edges(everything))
            if name not in living:
                self._choose_path_through(name)
        return self._chosen_weights()

    def _chosen_weights(self) -> Masks:
        return {
            name: self.paths.weights((chosen > 0).to(self.masks[name].device), self._values(name))
            for name, chosen in self.hard.items()
        }

    def _choose_whole_path(self, through: str) -> None:
        """Choose the entries of one good path through a layer, all at once.

        Every edge is multiplied by its share of all paths, again and again. Paths of large shares gain by it,
        until one has nearly all. It may need more, which `_choose_path_through` finds: the other factor of a
        product, say.
        """
        edges = self._edges(set())
        generator = torch.Generator().manual_seed(0)
        for name in self.masks:  # of equal ones, one is to win
            noise = torch.rand(edges[name].shape, generator=generator, dtype=edges[name].dtype)
            edges[name] = edges[name] * (1 + NOISE * noise)
        for _ in range(ROUNDS):
            slopes = self.paths.slopes(edges)
            shares = {name: slopes[name].cpu() * edges[name] for name in self.masks}
            there = float(shares[through].sum())
            if not there > 0:
                return
            if there < MOST:
                edges[through] = edges[through] * min(PULL, 100 * (1 - there) / there)
                continue
            if not any(bool(((share > UNSURE) & (share < 1 - UNSURE)).any()) for share in shares.values()):
                break
            for name, share in shares.items():
                grown = edges[name] * share
                # The largest is smaller by the share of the layer, so that branches lose what they have less.
                largest = edges[name].max() * share.sum().clamp(max=1)
                shrunk = grown * (largest / grown.max().clamp(min=torch.finfo(grown.dtype).tiny))
                # None goes to zero: the other factor of a product has to be there.
                edges[name] = shrunk.clamp(min=float(largest) * LEAST) * (edges[name] > 0)
        for name, share in shares.items():
            is_new = (share.flatten() > 0.5) & (self.hard[name].view(-1) == 0)
            self._set_chosen(name, is_new.nonzero().flatten(), True)

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
        return name in self.paths.living(self._edges(hard))

    def _set_chosen(self, layer: str, entries: torch.Tensor, chosen: bool) -> None:
        """Choose entries of ``layer`` (flat indices), or take the choice back."""
        self.hard[layer].view(-1)[entries] = float(chosen)
        self.soft[layer].view(-1)[entries] *= CHOSEN if chosen else 1 / CHOSEN

    def _choose_entry(self, layer: str, through: str, hard: set[str]) -> None:
        """Choose the entry of ``layer`` that lies on the best paths through the layer ``through``.

        The best few are tried in turn. None of them alone leaves a path where the layer makes both factors of
        a product, as that of queries and keys: then as few are chosen together as are found.
        """
        share = self._share_of_paths(layer, through, hard)
        is_open = (self.hard[layer].view(-1) == 0) & (self.soft[layer].view(-1) > 0)
        for index in share.topk(min(TRIES, share.numel())).indices:
            if not is_open[index]:
                continue
            self._set_chosen(layer, index, True)
            if self._has_path(through, hard | {layer}):
                return
            self._set_chosen(layer, index, False)
        self._choose_several(layer, through, hard, share * is_open)

    def _choose_several(self, layer: str, through: str, hard: set[str], share: torch.Tensor) -> None:
        """Choose entries of ``layer`` that leave a path together, and of these only what it needs.

        Those with the largest ``share`` and those on the best paths anywhere are taken, twice as many each
        time: other factors are seldom on paths through ``through``.
        """
        edges = self._edges(hard)
        anywhere = (self.paths.slopes(edges)[layer].cpu() * edges[layer]).flatten()
        is_open = (self.hard[layer].view(-1) == 0) & (self.soft[layer].view(-1) > 0)
        orders = [values.masked_fill(~is_open, -1.0).argsort(descending=True) for values in (share, anywhere)]
        number, chosen = 2, orders[0][:0]
        while number < 2 * len(share):
            found = torch.unique(torch.cat([order[:number] for order in orders]))
            chosen = found[is_open[found]]
            self._set_chosen(layer, chosen, True)
            if self._has_path(through, hard | {layer}):
                break
            self._set_chosen(layer, chosen, False)
            number *= 2
        else:
            self._set_chosen(layer, chosen, True)
            return
        size = len(chosen)
        while size > 1:
            size = (size + 1) // 2
            for part in chosen.split(size):
                self._set_chosen(layer, part, False)
                if not self._has_path(through, hard | {layer}):
                    self._set_chosen(layer, part, True)
            chosen = chosen[self.hard[layer].view(-1)[chosen] > 0]

    def _share_of_paths(self, layer: str, through: str, hard: set[str]) -> torch.Tensor:
        """Return the share that each entry of ``layer`` has in the paths through the layer ``through``."""
        edges = self._pulled(through, hard)
        return (self.paths.slopes(edges)[layer].cpu() * edges[layer]).flatten()

    def _pulled(self, through: str, hard: set[str]) -> dict[str, torch.Tensor]:
        """Return the edges with those of ``through`` heavier, until nearly all paths, by weight, go there."""
        edges = self._edges(hard)
        for pull in (1.0, PULL, PULL):
            edges[through] = edges[through] * pull
            if float((self.paths.slopes(edges)[through].cpu() * edges[through]).sum()) > MOST:
                break
        return edges
