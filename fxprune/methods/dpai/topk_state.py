"""The exact top-k of scores that only rise, kept up to date instead of searched anew.

Scores of the weights of one or more layers come in, and after each rise the number of kept weights in every
kernel goes out. Two facts make it cheap. No score ever falls, so the k-th largest never falls either: a layer
changes only when some score outside passes the old threshold, and only weights between the old threshold and
the highest newcomer can leave. And weights that share one rise (all weights of a *unit*: a kernel at channel
resolution) keep their order for ever: a unit is described by how many of its weights are kept.
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

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import Granularity
from fxprune.sparsity.select import select

__all__ = ["Contest", "Listed", "Rule", "Selection", "Singles", "contest_of", "gathered", "is_sparse"]

Floats = NDArray[np.float32]
UP = np.float32(np.inf)
AHEAD, NEAR = 8, 0.3
"""Rises between two looks at every score of a listed layer: so many, if that is no farther."""
RARE = 16
"""A layer that keeps less than one weight in so many is listed."""


class Contest:
    """The units of some layers, each layer with a number of weights to keep.

    ``scores``: by layer, (units, weights per unit), in no order, ``-inf`` for a weight that may not be kept.
    ``rise``: how much the scores of each unit have risen since, a float32 tensor over all units of all layers
    in their order; the caller adds to it and then calls :meth:`settle`. ``counts``: weights kept per unit,
    likewise. Ties go to the lower index.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> None:
        self.names = tuple(scores)
        sizes = [len(score) for score in scores.values()]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.layer = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        self.sizes = np.array(sizes)
        width = max(score.shape[1] for score in scores.values())
        whole = torch.cat([_padded(score.float(), width) for score in scores.values()])
        self.table: Floats = whole.numpy()
        np.negative(self.table, out=self.table)
        self.table.sort(axis=1)  # in place: half the memory of a sort that also says where things were
        np.negative(self.table, out=self.table)
        self.rise = torch.zeros(len(self.table))
        self._rise: Floats = self.rise.numpy()
        self.counts = np.zeros(len(self.table), dtype=np.int32)
        self._columns = np.arange(width)
        self._next = np.empty_like(self._rise)
        self._last = np.empty_like(self._rise)
        self._bounds = np.empty_like(self._rise)
        self._work = np.empty_like(self._rise)
        self.thresholds = np.full(len(sizes), -np.inf, dtype=np.float32)
        self.resize(budget)

    def segment(self, name: str) -> slice:
        """Where the units of layer ``name`` are."""
        place = self.names.index(name)
        return slice(self.starts[place], self.starts[place + 1])

    def resize(self, budget: Mapping[str, int]) -> None:
        """Chooses anew, for other numbers of weights to keep."""
        for place, name in enumerate(self.names):
            where = self.segment(name)
            values = self.table[where] + self._rise[where, None]
            kept, self.thresholds[place] = _best(values, budget[name])
            self.counts[where] = kept.sum(1)
            self._bounds[where] = self.thresholds[place]
        self._edges(np.arange(len(self.table)))

    def settle(self) -> NDArray[np.intp]:
        """Chooses after a rise; returns the units whose count has changed."""
        reach = np.add(self._next, self._rise, out=self._work)
        newcomers = np.flatnonzero(reach >= self._bounds)
        if not len(newcomers):
            return newcomers
        tops = np.full(len(self.sizes), -np.inf, dtype=np.float32)
        np.maximum.at(tops, self.layer[newcomers], reach[newcomers])
        # Of those that are kept, only what is not above every newcomer can leave.
        weakest = np.add(self._last, self._rise, out=self._work)
        if len(tops) == 1:
            tops[0] = min(tops[0], self._most_that_leaves(newcomers, weakest[weakest <= tops[0]]))
            is_near = weakest <= tops[0]
        else:
            is_near = weakest <= np.repeat(tops, self.sizes)
        is_near[newcomers] = True
        return self._contend(np.flatnonzero(is_near), tops)

    def _most_that_leaves(self, newcomers: NDArray[np.intp], weakest: Floats) -> np.float32:
        """A value above which nothing leaves a single layer: at least as many as come are at or below it.

        ``weakest``: the least kept value of every unit that has one below the highest newcomer.
        """
        values = self.table.take(newcomers, 0)
        values += self._rise[newcomers, None]
        comes = (self._columns >= self.counts[newcomers, None]) & (values >= self.thresholds[0])
        number = np.count_nonzero(comes)
        return np.partition(weakest, number - 1)[number - 1] if 0 < number <= len(weakest) else UP

    def _contend(self, near: NDArray[np.intp], tops: Floats) -> NDArray[np.intp]:
        """Chooses among the units ``near``; values above ``tops`` are kept (by layer; -inf: no change)."""
        layer, before = self.layer[near], self.counts[near]
        values = self.table.take(near, 0)
        values += self._rise[near, None]
        kept = self._columns < before[:, None]
        is_above = values > (tops[0] if len(tops) == 1 else tops[layer, None])
        floor = self.thresholds[0] if len(tops) == 1 else self.thresholds[layer, None]
        rows, columns = (~is_above & (kept | (values >= floor))).nonzero()
        owner, value = layer[rows], values[rows, columns]
        # Of those in question as many are kept as were before, less those that are above and were not.
        if len(tops) == 1:
            number = int(np.count_nonzero(kept[rows, columns]) - np.count_nonzero(is_above & ~kept))
            room = np.array([number])
            chosen = np.flatnonzero(_stays(value, number)[0])
        else:  # all that are above were kept
            room = np.bincount(owner, kept[rows, columns], len(tops)).astype(np.int64)
            chosen = _chosen(owner, value, room)
        counts = _counted(is_above) + np.bincount(rows[chosen], minlength=len(near))
        lowest = np.nextafter(tops, UP)  # nobody at or below is kept, so far
        lowest[room > 0] = UP
        np.minimum.at(lowest, owner[chosen], value[chosen])
        for place in (tops > -UP).nonzero()[0].tolist():
            self.thresholds[place] = lowest[place]
            self._bounds[self.starts[place] : self.starts[place + 1]] = lowest[place]
        is_changed = counts != before
        changed: NDArray[np.intp] = near[is_changed]
        self.counts[changed] = counts[is_changed]
        self._edges(changed)
        return changed

    def _edges(self, units: NDArray[np.intp]) -> None:
        """The best score outside and the worst inside, without the rise, of some units."""
        counts, width = self.counts[units], self.table.shape[1]
        best = self.table[units, np.minimum(counts, width - 1)]
        worst = self.table[units, np.maximum(counts, 1) - 1]
        self._next[units] = np.where(counts < width, best, -UP)
        self._last[units] = np.where(counts > 0, worst, UP)


def _counted(flags: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many are set in each row; a product is many times faster than a sum over short rows."""
    counts: NDArray[np.int32] = flags.astype(np.float32).dot(_ones(flags.shape[1])).astype(np.int32)
    return counts


@cache
def _ones(number: int) -> Floats:
    return np.ones(number, dtype=np.float32)


def _chosen(owner: NDArray[np.int16], value: Floats, room: NDArray[np.int64]) -> NDArray[np.intp]:
    """The places of the best of each owner, as many as it has room for, ties by index."""
    order = np.lexsort((-value, owner))  # stable: equal scores stay in the order of their indices
    ends = np.bincount(owner, minlength=len(room)).cumsum()
    # Ranks start anew with each owner; the best are taken until its room is full.
    last = ends - np.diff(ends, prepend=0) + room
    chosen: NDArray[np.intp] = order[np.arange(len(order)) < last[owner[order]]]
    return chosen


def _best(values: Floats, number: int) -> tuple[NDArray[np.bool_], np.float32]:
    """The ``number`` largest entries, ties by index, and the smallest of them (inf for none)."""
    if number == 0:
        return np.zeros(values.shape, dtype=bool), np.float32(np.inf)
    flat = torch.from_numpy(values).flatten()
    threshold = np.float32(flat.kthvalue(flat.numel() - number + 1).values.item())
    kept = values > threshold
    ties = np.flatnonzero(values.ravel() == threshold)[: number - int(kept.sum())]
    kept.ravel()[ties] = True
    return kept, threshold


class Singles:
    """A contest of one large layer, each weight a unit: nothing is kept but scores and one byte per weight.

    ``rise`` is the scores themselves: ``scores``, (units, 1), are taken over, and risen in place.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> None:
        ((self.name, score),) = scores.items()
        self.rise = score.float().flatten()
        self._values: Floats = self.rise.numpy()
        self.resize(budget)

    def segment(self, name: str) -> slice:
        """Where the units of the layer are."""
        return slice(0, len(self._values))

    def resize(self, budget: Mapping[str, int]) -> None:
        """Chooses anew, for another number of weights to keep."""
        self.number = budget[self.name]
        kept, self.threshold = _best(self._values, self.number)
        self.counts = kept.view(np.int8)

    def settle(self) -> NDArray[np.intp]:
        """Chooses after a rise; returns the units whose count has changed."""
        is_in = self._values >= self.threshold
        excess = int(np.count_nonzero(is_in)) - self.number
        if not excess:
            return np.empty(0, dtype=np.intp)
        inside = np.flatnonzero(is_in)
        stays, self.threshold = _stays(self._values[inside], self.number)
        is_changed = stays != (self.counts[inside] > 0)
        changed: NDArray[np.intp] = inside[is_changed]
        self.counts[changed] = stays[is_changed]
        return changed


class Listed:
    """A contest of one large layer, each weight a unit, of which few are kept: their places are listed.

    ``rise`` is the scores themselves, as in :class:`Singles`. After a rise :meth:`look` has to see every
    part, best while it is in the cache. ``leap``: what no score rises by more in one go. ``kept``: the places
    of the best, ascending.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int], leap: float) -> None:
        ((self.name, score),) = scores.items()
        self.rise = score.float().flatten()
        self.leap, self._ahead = leap, max(1, min(AHEAD, int(NEAR / leap)))
        self._values: Floats = self.rise.numpy()
        self._inside: list[tuple[NDArray[np.intp], Floats]] = []
        self.resize(budget)

    def segment(self, name: str) -> slice:
        """Where the units of the layer are."""
        return slice(0, len(self._values))

    def resize(self, budget: Mapping[str, int]) -> None:
        """Chooses anew, for another number of weights to keep."""
        self.number = budget[self.name]
        kept, self.threshold = _best(self._values, self.number)
        self.kept = np.flatnonzero(kept)
        # By the start of a part, who can be at the threshold within so many rises; it never falls.
        self._near: dict[int, NDArray[np.intp]] = {}
        self._left = 0

    def look(self, part: slice) -> None:
        """Notes who is at or above the threshold as it was."""
        values = self._values[part]
        if not self._left:
            reach = np.float32(1.001 * (self._ahead - 1) * self.leap)  # and something for rounding
            self._near[part.start] = np.flatnonzero(values >= self.threshold - reach)
        near = self._near[part.start]
        reached = self.rise[part].index_select(0, torch.from_numpy(near)).numpy()  # faster than numpy's
        is_in = reached >= self.threshold
        self._inside.append((near.compress(is_in) + part.start, reached.compress(is_in)))

    def settle(self) -> bool:
        """Chooses after a rise, of all parts; whether any place has changed."""
        self._left = (self._left or self._ahead) - 1
        inside, values = (np.concatenate(found) for found in zip(*self._inside, strict=True))
        self._inside.clear()
        if len(inside) == self.number:
            return False
        stays, self.threshold = _stays(values, self.number)
        before, self.kept = self.kept, inside.compress(stays)
        return not np.array_equal(before, self.kept)


def _stays(values: Floats, number: int) -> tuple[NDArray[np.bool_], np.float32]:
    """The ``number`` largest of more than that, ties by index, and the threshold: the least of them."""
    excess = len(values) - number
    threshold = np.partition(values, excess)[excess] if number else np.nextafter(values.max(), UP)
    stays = values > threshold
    ties = np.flatnonzero(values == threshold)
    stays[ties[: number - int(stays.sum())]] = True
    return stays, threshold


class Selection:
    """The same for whole groups of weights, selected anew each time: every weight is a unit."""

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        budget: Mapping[str, int],
        granularity: Granularity,
        within: Mapping[str, Tensor],
    ) -> None:
        self.granularity, self.within = granularity, {name: mask.cpu() for name, mask in within.items()}
        self.names = tuple(scores)
        self.starts = np.concatenate([[0], np.cumsum([len(score) for score in scores.values()])])
        self.initial = torch.cat([score.flatten() for score in scores.values()]).clamp(min=0)
        self.rise = torch.zeros(len(self.initial))
        self.resize(budget)

    @classmethod
    def under(cls, granularity: Granularity, within: Mapping[str, Tensor]) -> Rule:
        """The rule that an ascent is made with."""
        return lambda scores, budget: cls(scores, budget, granularity, within)

    def segment(self, name: str) -> slice:
        """Where the units of layer ``name`` are."""
        place = self.names.index(name)
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def resize(self, budget: Mapping[str, int]) -> None:
        """Chooses anew, for other numbers of weights to keep."""
        sizes = {name: self.within[name].numel() for name in self.names}
        layers = {name: budget[name] for name in self.names}
        whole = Budget(sum(layers.values()), sizes, layers)
        self.budget = whole.capped(self.granularity.room(self.within))
        self.settle()

    def settle(self) -> NDArray[np.intp]:
        """Chooses after a rise; returns all units."""
        risen = self.initial + self.rise
        scores = {name: risen[self.segment(name)].view(self.within[name].shape) for name in self.names}
        masks = select(scores, self.budget, within=self.within, granularity=self.granularity, method="dpai")
        self.counts: NDArray[np.int32] = (
            torch.cat([masks[name].flatten() for name in self.names]).int().numpy()
        )
        return np.arange(len(self.counts))


Rule = Callable[[Mapping[str, Tensor], Mapping[str, int]], Contest | Singles | Selection]
"""Makes the contest of some layers from their scores (units x weights per unit) and budgets."""


def contest_of(scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> Contest | Singles:
    """The leaner contest where it serves, else the general one."""
    if len(scores) == 1 and all(score.shape[1] == 1 for score in scores.values()):
        return Singles(scores, budget)
    return Contest(scores, budget)


def is_sparse(size: int, number: int) -> bool:
    """Whether so few of so many units are kept that a list of them is better than a number for each."""
    return number * RARE < size


def gathered(widths: Mapping[str, int], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Layers in groups of up to ``limit`` table entries (units x the widest of them); larger layers alone."""
    groups: list[list[str]] = []
    for name in widths:
        group = [*groups[-1], name] if groups else [name]
        if groups and sum(sizes[n] for n in group) * max(widths[n] for n in group) <= limit:
            groups[-1] = group
        else:
            groups.append([name])
    return groups


def _padded(scores: Tensor, width: int) -> Tensor:
    """Units with fewer weights than others get some that may not be kept."""
    return pad(scores, (0, width - scores.shape[1]), value=-np.inf)
