"""Granularities on a graph: which axis of a parameter is its output, and which channels belong together.

A granularity and a ``ChannelGraph`` come in; the granularity that reads parameters the way the network does
goes out. Channels whose values meet in one entry with no weight in between (residual sums, gates, depthwise
convolutions, the heads of attention) are one group: they are kept or dropped together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from fxprune.channels.groups import channel_groups
from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ChannelGraph
from fxprune.sparsity.granularity import CHANNEL, NEVER, WEIGHT, Bundle, Granularity
from fxprune.sparsity.masks import Masks, kept


def fitted(granularity: Granularity, graph: ChannelGraph) -> Granularity:
    """``granularity`` for the parameters of ``graph``: the same where nothing is transposed or tied."""
    transposed = {name: kernels.groups for name, kernels in graph.kernels.items() if kernels.transposed}
    if granularity == CHANNEL and graph.kernels:
        return Channels(channel_groups(graph), transposed)
    if granularity == WEIGHT or isinstance(granularity, (Channels, Oriented)) or not transposed:
        return granularity
    return Oriented(granularity, transposed)


@dataclass(frozen=True)
class Oriented:
    """``inner``, for parameters of which some are transposed: they are read as (out, in / groups, taps) too.

    ``transposed``: their names, and the number of groups of each.
    """

    inner: Granularity
    transposed: Mapping[str, int]

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """Those of ``inner``."""
        found = self.inner.bundles(self._turned(scores), self._turned(masks))
        return [replace(bundle, spread=partial(self._spread, bundle)) for bundle in found]

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """That of ``inner``."""
        return self.inner.room(self._turned(masks))

    def _turned(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        groups = self.transposed
        return {
            name: swap_orientation(x, groups[name]) if name in groups else x for name, x in tensors.items()
        }

    def _spread(self, bundle: Bundle, chosen: torch.Tensor) -> Masks:
        return self._turned(bundle.spread(chosen))


@dataclass(frozen=True, eq=False)
class Channels:
    """Whole output channels, with those of other parameters that are tied to them.

    ``groups``: parameter -> the number of the group of each of its output channels; equal numbers are tied.
    ``transposed``: as in ``Oriented``. Under a budget that fixes layers no parameter may be tied to another.
    """

    groups: Mapping[str, torch.Tensor]
    transposed: Mapping[str, int]

    def __str__(self) -> str:
        return "channel"

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """One bundle for every set of parameters that are tied, in the order of their first one."""
        return [self._bundle(names, scores, masks) for names in self._families(list(scores))]

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """All that is left."""
        return kept(masks)

    def _families(self, names: list[str]) -> list[tuple[str, ...]]:
        families: list[tuple[set[int], list[str]]] = []
        for name in names:
            own = set(self.groups[name].tolist())
            joined = [family for family in families if family[0] & own]
            for family in joined:
                own |= family[0]
            members = [member for family in joined for member in family[1]]
            families = [family for family in families if family not in joined]
            families.append((own, [*members, name]))
        order = {name: place for place, name in enumerate(names)}
        return sorted((tuple(members) for _, members in families), key=lambda members: order[members[0]])

    def _bundle(
        self, names: tuple[str, ...], scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
    ) -> Bundle:
        numbers = torch.cat([self.groups[name] for name in names])
        known, places = torch.unique(numbers, return_inverse=True)
        order = torch.full_like(known, len(places)).scatter_reduce(
            0, places, torch.arange(len(places)), "amin"
        )
        rank = torch.empty_like(order)
        rank[order.argsort()] = torch.arange(len(order))
        device = scores[names[0]].device
        parts = torch.split(rank[places].to(device), [len(self.groups[name]) for name in names])
        where = dict(zip(names, parts, strict=True))
        pooled = torch.zeros(len(known), dtype=torch.float64, device=device)
        sizes = torch.zeros(len(known), dtype=torch.int64, device=device)
        for name, index in where.items():
            alive = self._by_channel(name, masks[name])
            values = self._by_channel(name, scores[name])
            pooled.index_add_(0, index, values.where(alive, 0).sum(1, dtype=torch.float64))
            sizes.index_add_(0, index, alive.sum(1))
        dtype = scores[names[0]].dtype
        limit = torch.finfo(dtype).max
        final = pooled.clamp(-limit, limit).to(dtype).where(sizes > 0, NEVER)

        def spread(chosen: torch.Tensor) -> Masks:
            return {name: self._along(name, chosen[index], masks[name]) for name, index in where.items()}

        return Bundle(names, final, sizes, spread)

    def _by_channel(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return (swap_orientation(x, self.transposed[name]) if name in self.transposed else x).flatten(1)

    def _along(self, name: str, chosen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if name not in self.transposed:
            return chosen.view(-1, *[1] * (mask.dim() - 1)) & mask
        groups = self.transposed[name]
        shape = (groups, mask.shape[0] // groups, *mask.shape[1:])
        wide = chosen.view(groups, 1, -1, *[1] * (mask.dim() - 2)).expand(shape)
        return wide.reshape(mask.shape) & mask
