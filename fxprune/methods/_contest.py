"""The exact top-k of scores that only rise, kept up to date instead of searched anew.

Scores of the weights of one or more layers come in, and after each rise the number of kept weights in every
kernel goes out. Two facts make it cheap. No score ever falls, so the k-th largest never falls either: a layer
changes only when some score outside passes the old threshold, and only weights between the old threshold and
the highest newcomer can leave. And weights that share one rise (all weights of a *unit*: a kernel at channel
resolution) keep their order for ever: a unit is described by how many of its weights are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import Granularity
from fxprune.sparsity.select import select

__all__ = ["Contest", "Rule", "Selection", "gathered"]

Floats = NDArray[np.float32]
NONE = np.float32(-np.inf)


class Contest:
    """Layers whose units have equally many weights, each layer with a number of weights to keep.

    ``scores``: by layer, (units, weights per unit), in no order, ``-inf`` for a weight that may not be kept.
    ``rise``: how much the scores of each unit have risen since, a float32 tensor over all units of all layers
    in their order; the caller adds to it and then calls :meth:`settle`. ``counts``: weights kept per unit,
    likewise. Ties go to the lower index.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> None:
        self.names = tuple(scores)
        sizes = [len(score) for score in scores.values()]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.layer = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        self.sizes = np.array(sizes)
        ordered = [score.sort(dim=1, descending=True, stable=True) for score in scores.values()]
        self.table: Floats = torch.cat([part.values for part in ordered]).float().numpy()
        self.rise = torch.zeros(len(self.table))
        self._rise: Floats = self.rise.numpy()
        self.counts = np.zeros(len(self.table), dtype=np.int32)
        self._next = np.empty_like(self._rise)
        self._last = np.empty_like(self._rise)
        self._bounds = np.empty_like(self._rise)
        self._work = np.empty_like(self._rise)
        self.thresholds = np.full(len(sizes), -np.inf, dtype=np.float32)
        self.resize(budget)

    def segment(self, name: str) -> slice:
        """Where the units of layer ``name`` are."""
        place = self.names.index(name)
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

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
        threatened = np.flatnonzero(weakest <= (tops[0] if len(tops) == 1 else np.repeat(tops, self.sizes)))
        near = np.union1d(newcomers, threatened)
        return self._contend(near, tops)

    def _contend(self, near: NDArray[np.intp], tops: Floats) -> NDArray[np.intp]:
        layer = self.layer[near]
        values = self.table[near] + self._rise[near, None]
        kept = np.arange(values.shape[1]) < self.counts[near, None]
        open_ = (values <= tops[layer, None]) & (kept | (values >= self.thresholds[layer, None]))
        rows, columns = np.nonzero(open_)
        owner, value = layer[rows], values[rows, columns]
        room = np.bincount(owner[kept[rows, columns]], minlength=len(tops))
        order = np.lexsort((-value, owner))  # stable: equal scores stay in the order of their indices
        first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(tops)))])[:-1]
        rank = np.arange(len(order)) - first[owner[order]]
        chosen = order[rank < room[owner[order]]]
        counts = (kept & ~open_).sum(1) + np.bincount(rows[chosen], minlength=len(near))
        lowest = np.full(len(tops), np.inf, dtype=np.float32)
        np.minimum.at(lowest, owner[chosen], value[chosen])
        for place in np.flatnonzero(tops > -np.inf):
            # Nobody at or below the highest newcomer is kept: the threshold is just above it.
            above = np.nextafter(tops[place], np.float32(np.inf))
            self.thresholds[place] = lowest[place] if room[place] else above
            self._bounds[self.starts[place] : self.starts[place + 1]] = self.thresholds[place]
        changed: NDArray[np.intp] = near[counts != self.counts[near]]
        self.counts[near] = counts
        self._edges(changed)
        return changed

    def _edges(self, units: NDArray[np.intp]) -> None:
        """The best score outside and the worst inside, without the rise, of some units."""
        counts, width = self.counts[units], self.table.shape[1]
        best = self.table[units, np.minimum(counts, width - 1)]
        worst = self.table[units, np.maximum(counts, 1) - 1]
        self._next[units] = np.where(counts < width, best, NONE)
        self._last[units] = np.where(counts > 0, worst, -NONE)


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


Rule = Callable[[Mapping[str, Tensor], Mapping[str, int]], Contest | Selection]
"""Makes the contest of some layers from their scores (units x weights per unit) and budgets."""


def gathered(widths: Mapping[str, int], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Layers whose units have equally many weights together, up to ``limit`` units; larger layers alone."""
    groups: list[list[str]] = []
    latest: dict[int, list[str]] = {}
    for name, width in widths.items():
        group = latest.get(width, [])
        if not group or sum(sizes[other] for other in group) + sizes[name] > limit:
            group = []
            groups.append(group)
        group.append(name)
        latest[width] = group
    return groups
