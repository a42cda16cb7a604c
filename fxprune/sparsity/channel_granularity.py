"""Granularities on a graph: which axis of a parameter is its output, and which channels belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx, nn

from fxprune.channels.groups import group_channels
from fxprune.channels.memory import count_memory, live_ranges
from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ChannelGraph
from fxprune.sparsity.by_name import check_used
from fxprune.sparsity.granularity import WEIGHT, Bundle, Channel, Granularity
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks


def fitted(
    granularity: Granularity,
    graph: ChannelGraph,
    prunable: Collection[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    model: nn.Module | None = None,
    fixed: Collection[str] = (),
) -> Granularity:
    """Return ``granularity`` as the parameters of ``graph`` need it; the same where nothing is transposed.

    ``prunable``: the parameters that may be pruned; the channels of all others stay. ``shapes``: those of all
    parameters of the network. ``model``: the captured network, for ``of="memory"``. ``fixed``: others whose
    channels stay, such as embeddings.
    """
    if isinstance(granularity, Channel) and graph.kernels:
        excluded = [*(name for name in graph.kernels if name not in prunable), *fixed]
        groups = group_channels(graph, fixed=excluded, whole_heads=granularity.whole_heads)
        counted = None
        if granularity.of == "memory":
            if not isinstance(model, fx.GraphModule):
                raise ValueError("of='memory': the network has no graph, which says what is alive together")
            counted = partial(count_memory, live_ranges(model, graph))
        for option in ("min_channels", "max_sparsity"):
            check_used(option, getattr(granularity, option), prunable)
        return ChannelGroups(groups, tuple(prunable), granularity, shapes or {}, counted)
    transposed = {name: kernels.groups for name, kernels in graph.kernels.items() if kernels.transposed}
    if granularity == WEIGHT or isinstance(granularity, (ChannelGroups, Oriented)) or not transposed:
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
