"""Keep the exact top-k of every layer's scores while the scores rise.

A *unit* is a set of weights that share one rise (a kernel at channel resolution, or a single weight). The
classes here and in :mod:`fxprune.methods.dpai.layer_topk` are variants of
:func:`fxprune.sparsity.select.select` for one layer budget each; ``tests/methods/dpai/test_topk_state.py``
holds them equal to it. They are faster for two reasons. No score falls, so that the k-th largest score of a
layer (its *threshold*) does not fall: a layer changes only when a pruned weight reaches the threshold. And
weights of one unit keep their order: the number of kept weights says which of them are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fxprune.methods.dpai.layer_topk import Floats, MaskTopK, keep_largest, top_k
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import Granularity
from fxprune.sparsity.select import select

__all__ = ["GranularTopK", "MakeTopK", "UnitTopK", "group_layers", "make_topk"]

INFINITY = np.float32(np.inf)


class UnitTopK:
    """Store the top-k of some layers as the number of kept weights of each unit.

    ``scores``: by layer, (units, weights per unit), ``-inf`` for a weight that may not be kept. ``rise``: how
    far the scores of each unit have risen since, one float32 per unit, all layers in their order; the caller
    adds to it and then calls :meth:`update`. ``counts``: kept weights per unit, likewise. Ties go to the
    lower index.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> None:
        self.names = tuple(scores)
        sizes = [len(score) for score in scores.values()]
        self.starts = [0, *itertools.accumulate(sizes)]
        self._layer_of = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        self._sizes = np.array(sizes)
        width = max(score.shape[1] for score in scores.values())
        padded = torch.cat([_pad_units(score.float(), width) for score in scores.values()])
        self.descending: Floats = padded.numpy()
        np.negative(self.descending, out=self.descending)
        self.descending.sort(axis=1)  # in place: half the memory of a sort that also returns indices
        np.negative(self.descending, out=self.descending)
        self.rise = torch.zeros(len(self.descending))
        self._rise: Floats = self.rise.numpy()
        self.counts = np.zeros(len(self.descending), dtype=np.int32)
        self._ranks = np.arange(width)
        # Of each unit, without the rise: its highest pruned and its lowest kept score.
        self._best_pruned = np.empty_like(self._rise)
        self._worst_kept = np.empty_like(self._rise)
        self.thresholds = np.full(len(sizes), -np.inf, dtype=np.float32)
        self._threshold_of_unit = np.empty_like(self._rise)
        self._scratch = np.empty_like(self._rise)
        self.set_budget(budget)

    def units_of(self, name: str) -> slice:
        """Return the units of the layer ``name``."""
        place = self.names.index(name)
        return slice(self.starts[place], self.starts[place + 1])

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Select the top-k of every layer for other numbers of weights to keep."""
        for place, name in enumerate(self.names):
            units = self.units_of(name)
            values = self.descending[units] + self._rise[units, None]
            kept, self.thresholds[place] = top_k(values, budget[name])
            self.counts[units] = kept.sum(1)
            self._threshold_of_unit[units] = self.thresholds[place]
        self._update_neighbours(np.arange(len(self.descending)))

    def update(self) -> NDArray[np.intp]:
        """Update the top-k after scores have risen; return the units whose count has changed.

        In a layer with weights that enter, the *ceiling* is a score above which every weight is kept: those
        that leave are at or below it. Only units with a kept weight at or below it are selected from again.
        """
        best_pruned = np.add(self._best_pruned, self._rise, out=self._scratch)
        entering = np.flatnonzero(best_pruned >= self._threshold_of_unit)
        if not len(entering):
            return entering
        ceilings = np.full(len(self._sizes), -np.inf, dtype=np.float32)
        np.maximum.at(ceilings, self._layer_of[entering], best_pruned[entering])
        worst_kept = np.add(self._worst_kept, self._rise, out=self._scratch)
        if len(ceilings) == 1:
            below = worst_kept[worst_kept <= ceilings[0]]
            ceilings[0] = min(ceilings[0], self._lower_ceiling(entering, below))
            is_open = worst_kept <= ceilings[0]
        else:
            is_open = worst_kept <= np.repeat(ceilings, self._sizes)
        is_open[entering] = True
        return self._reselect(np.flatnonzero(is_open), ceilings)

    def _lower_ceiling(self, entering: NDArray[np.intp], worst_kept: Floats) -> np.float32:
        """Return a lower ceiling for a single layer: the n-th smallest of ``worst_kept``.

        n is the number of weights at or above the threshold that enter: no more than n can leave, and at
        least n kept weights are at or below this score. ``worst_kept``: the lowest kept score of every unit
        that has one at or below the highest entering score.
        """
        values = self.descending.take(entering, 0)
        values += self._rise[entering, None]
        enters = (self._ranks >= self.counts[entering, None]) & (values >= self.thresholds[0])
        n = np.count_nonzero(enters)
        return np.partition(worst_kept, n - 1)[n - 1] if 0 < n <= len(worst_kept) else INFINITY

    def _reselect(self, units: NDArray[np.intp], ceilings: Floats) -> NDArray[np.intp]:
        """Select again among the weights of ``units``; return the units whose count has changed.

        ``ceilings``: by layer, the score above which all weights are kept; ``-inf`` for layers that stay.
        """
        is_single = len(ceilings) == 1
        layer, before = self._layer_of[units], self.counts[units]
        values = self.descending.take(units, 0)
        values += self._rise[units, None]
        was_kept = self._ranks < before[:, None]
        is_above = values > (ceilings[0] if is_single else ceilings[layer, None])
        threshold = self.thresholds[0] if is_single else self.thresholds[layer, None]
        rows, ranks = (~is_above & (was_kept | (values >= threshold))).nonzero()
        owner, value = layer[rows], values[rows, ranks]
        # k stays: as many candidates are kept as were kept before, less the weights that are new above the
        # ceiling. (Of several layers none is new there, as the ceiling is the highest entering score.)
        if is_single:
            number = int(np.count_nonzero(was_kept[rows, ranks]) - np.count_nonzero(is_above & ~was_kept))
            room = np.array([number])
            chosen = np.flatnonzero(keep_largest(value, number)[0])
        else:
            room = np.bincount(owner, was_kept[rows, ranks], len(ceilings)).astype(np.int64)
            chosen = _top_k_by_layer(owner, value, room)
        counts = _count_in_rows(is_above) + np.bincount(rows[chosen], minlength=len(units))
        self._set_thresholds(ceilings, room, owner[chosen], value[chosen])
        is_changed = counts != before
        changed: NDArray[np.intp] = units[is_changed]
        self.counts[changed] = counts[is_changed]
        self._update_neighbours(changed)
        return changed

    def _set_thresholds(
        self, ceilings: Floats, room: NDArray[np.int64], owner: NDArray[np.int16], value: Floats
    ) -> None:
        """Set the thresholds of the layers with a ceiling to the lowest score that was chosen in them.

        ``owner``, ``value``: layer and score of the chosen weights. Where there was no ``room``, nothing at
        or below the ceiling is kept.
        """
        lowest = np.nextafter(ceilings, INFINITY)
        lowest[room > 0] = INFINITY
        np.minimum.at(lowest, owner, value)
        for place in (ceilings > -INFINITY).nonzero()[0].tolist():
            self.thresholds[place] = lowest[place]
            self._threshold_of_unit[self.starts[place] : self.starts[place + 1]] = lowest[place]

    def _update_neighbours(self, units: NDArray[np.intp]) -> None:
        """Look up the highest pruned and the lowest kept score of ``units``, without the rise."""
        counts, width = self.counts[units], self.descending.shape[1]
        best_pruned = self.descending[units, np.minimum(counts, width - 1)]
        worst_kept = self.descending[units, np.maximum(counts, 1) - 1]
        self._best_pruned[units] = np.where(counts < width, best_pruned, -INFINITY)
        self._worst_kept[units] = np.where(counts > 0, worst_kept, INFINITY)


class GranularTopK:
    """Select whole groups of weights again after every rise; every weight is a unit.

    The attributes are those of :class:`UnitTopK`. ``granularity``: the groups; ``masks``: the weights that
    may be kept.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        budget: Mapping[str, int],
        granularity: Granularity,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.granularity, self.masks = granularity, {name: mask.cpu() for name, mask in masks.items()}
        self.names = tuple(scores)
        self.starts = np.concatenate([[0], np.cumsum([len(score) for score in scores.values()])])
        self.initial = torch.cat([score.flatten() for score in scores.values()]).clamp(min=0)
        self.rise = torch.zeros(len(self.initial))
        self.set_budget(budget)

    @classmethod
    def factory(cls, granularity: Granularity, masks: Mapping[str, Tensor]) -> MakeTopK:
        """Return the function that makes the top-k of these groups from scores and budgets."""
        return lambda scores, budget: cls(scores, budget, granularity, masks)

    def units_of(self, name: str) -> slice:
        """Return the units of the layer ``name``."""
        place = self.names.index(name)
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Select for other numbers of weights to keep, or fewer where no groups make up the number."""
        sizes = {name: self.masks[name].numel() for name in self.names}
        layers = {name: budget[name] for name in self.names}
        whole = Budget(sum(layers.values()), sizes, layers)
        self.budget = whole.capped(self.granularity.room(self.masks))
        self.update()

    def update(self) -> NDArray[np.intp]:
        """Select again after scores have risen; return all units."""
        risen = self.initial + self.rise
        scores = {name: risen[self.units_of(name)].view(self.masks[name].shape) for name in self.names}
        masks = select(scores, self.budget, within=self.masks, granularity=self.granularity, method="dpai")
        self.counts: NDArray[np.int32] = (
            torch.cat([masks[name].flatten() for name in self.names]).int().numpy()
        )
        return np.arange(len(self.counts))


MakeTopK = Callable[[Mapping[str, Tensor], Mapping[str, int]], UnitTopK | MaskTopK | GranularTopK]
"""Make the top-k of some layers from their scores (units x weights per unit) and budgets."""


def make_topk(scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> UnitTopK | MaskTopK:
    """Make the top-k that takes least memory: a :class:`MaskTopK` for one layer of single weights."""
    if len(scores) == 1 and all(score.shape[1] == 1 for score in scores.values()):
        return MaskTopK(scores, budget)
    return UnitTopK(scores, budget)


def group_layers(widths: Mapping[str, int], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Group consecutive layers, each group with at most ``limit`` entries; larger layers stay alone.

    ``widths``: weights per unit, ``sizes``: units, of every layer. The entries of a group are its units times
    the largest width among its layers.
    """
    groups: list[list[str]] = []
    for name in widths:
        group = [*groups[-1], name] if groups else [name]
        if groups and sum(sizes[n] for n in group) * max(widths[n] for n in group) <= limit:
            groups[-1] = group
        else:
            groups.append([name])
    return groups


def _top_k_by_layer(owner: NDArray[np.int16], value: Floats, k: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the indices of the ``k[layer]`` largest values of every layer, ties by index."""
    order = np.lexsort((-value, owner))  # stable: equal scores stay in the order of their indices
    ends = np.bincount(owner, minlength=len(k)).cumsum()
    starts = ends - np.diff(ends, prepend=0)
    chosen: NDArray[np.intp] = order[np.arange(len(order)) < (starts + k)[owner[order]]]
    return chosen


def _count_in_rows(flags: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Count the set flags of each row; a product is many times faster than a sum over short rows."""
    counts: NDArray[np.int32] = flags.astype(np.float32).dot(_ones(flags.shape[1])).astype(np.int32)
    return counts


@cache
def _ones(number: int) -> Floats:
    return np.ones(number, dtype=np.float32)


def _pad_units(scores: Tensor, width: int) -> Tensor:
    """Pad every unit to ``width`` weights with scores of ``-inf``, which are never kept."""
    return pad(scores, (0, width - scores.shape[1]), value=-np.inf)
