"""Keep the exact top-k of one large layer while its scores rise, each weight being a unit of its own.

Variants of :func:`fxprune.sparsity.select.select` that update the previous choice instead of selecting again;
``tests/methods/dpai/test_layer_topk.py`` holds them equal to it. As no score falls, the k-th largest score
(the *threshold*) does not fall either, so that only weights at or above the old threshold can be in the new
top-k.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Floats", "IndexTopK", "MaskTopK", "keep_largest", "keeps_few", "top_k"]

Floats = NDArray[np.float32]
FULL_SCAN_STEPS, FULL_SCAN_RISE = 8, 0.3
"""Steps between two scans of all scores of :class:`IndexTopK`, as long as scores rise by less than this."""
INDEX_RATIO = 16
""":class:`IndexTopK` serves layers that keep less than one weight in so many."""
ROUNDING = 1.001
"""Margin on how far a score can rise in some steps, for the rounding of float32 sums."""


class MaskTopK:
    """Store the top-k of one layer as a mask: the scores and one byte per weight are all the state.

    ``scores``: by layer (one), of shape (units, 1), ``-inf`` for a weight that may not be kept; the tensor is
    taken over and becomes ``rise``, which the caller adds to before it calls :meth:`update`. ``counts``: 1
    for a kept weight, else 0. Ties go to the lower index.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int]) -> None:
        ((self.name, score),) = scores.items()
        self.rise = score.float().flatten()
        self._values: Floats = self.rise.numpy()
        self.set_budget(budget)

    def units_of(self, name: str) -> slice:
        """Return the units of the layer ``name``."""
        return slice(0, len(self._values))

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Select the top-k for another k."""
        self.k = budget[self.name]
        kept, self.threshold = top_k(self._values, self.k)
        self.counts = kept.view(np.int8)

    def update(self) -> NDArray[np.intp]:
        """Update the top-k after scores have risen; return the units that entered or left."""
        is_candidate = self._values >= self.threshold
        excess = int(np.count_nonzero(is_candidate)) - self.k
        if not excess:
            return np.empty(0, dtype=np.intp)
        candidates = np.flatnonzero(is_candidate)
        is_kept, self.threshold = keep_largest(self._values[candidates], self.k)
        is_changed = is_kept != (self.counts[candidates] > 0)
        changed: NDArray[np.intp] = candidates[is_changed]
        self.counts[changed] = is_kept[is_changed]
        return changed


class IndexTopK:
    """Store the top-k of one layer as ascending indices, for layers that keep few of their weights.

    ``scores`` and ``rise`` are those of :class:`MaskTopK`. ``max_rise``: a bound on how far a score rises
    between two calls of :meth:`update`. Before each update, :meth:`scan` must see every block of the layer,
    best while the block is in the cache. ``kept``: the indices of the top-k, ascending.
    """

    def __init__(self, scores: Mapping[str, Tensor], budget: Mapping[str, int], max_rise: float) -> None:
        ((self.name, score),) = scores.items()
        self.rise = score.float().flatten()
        self.max_rise = max_rise
        self._period = max(1, min(FULL_SCAN_STEPS, int(FULL_SCAN_RISE / max_rise)))
        self._values: Floats = self.rise.numpy()
        self._found: list[tuple[NDArray[np.intp], Floats]] = []
        self.set_budget(budget)

    def units_of(self, name: str) -> slice:
        """Return the units of the layer ``name``."""
        return slice(0, len(self._values))

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Select the top-k for another k."""
        self.k = budget[self.name]
        kept, self.threshold = top_k(self._values, self.k)
        self.kept = np.flatnonzero(kept)
        # By the start of a block, the weights that can reach the threshold before the next full scan.
        self._near: dict[int, NDArray[np.intp]] = {}
        self._steps_to_full_scan = 0

    def scan(self, block: slice) -> None:
        """Collect the weights of a block at or above the threshold of the last update."""
        values = self._values[block]
        if not self._steps_to_full_scan:
            reach = np.float32(ROUNDING * (self._period - 1) * self.max_rise)
            self._near[block.start] = np.flatnonzero(values >= self.threshold - reach)
        near = self._near[block.start]
        near_values = self.rise[block].index_select(0, torch.from_numpy(near)).numpy()  # faster than numpy's
        is_candidate = near_values >= self.threshold
        self._found.append((near.compress(is_candidate) + block.start, near_values.compress(is_candidate)))

    def update(self) -> bool:
        """Update the top-k from the scans of all blocks; return whether it has changed."""
        self._steps_to_full_scan = (self._steps_to_full_scan or self._period) - 1
        candidates, values = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        self._found.clear()
        if len(candidates) == self.k:
            return False
        is_kept, self.threshold = keep_largest(values, self.k)
        before, self.kept = self.kept, candidates.compress(is_kept)
        return not np.array_equal(before, self.kept)


def keeps_few(units: int, k: int) -> bool:
    """Return whether a list of the k kept units is cheaper than one number for each of ``units``."""
    return k * INDEX_RATIO < units


def top_k(values: Floats, k: int) -> tuple[NDArray[np.bool_], np.float32]:
    """Select the k largest entries, ties by index; return their mask, and the smallest of them or inf."""
    if k == 0:
        return np.zeros(values.shape, dtype=bool), np.float32(np.inf)
    flat = torch.from_numpy(values).flatten()
    threshold = np.float32(flat.kthvalue(flat.numel() - k + 1).values.item())
    kept = values > threshold
    ties = np.flatnonzero(values.ravel() == threshold)[: k - int(kept.sum())]
    kept.ravel()[ties] = True
    return kept, threshold


def keep_largest(values: Floats, k: int) -> tuple[NDArray[np.bool_], np.float32]:
    """Select the k largest of at least k values, ties by index; return their mask and the smallest of them.

    For k = 0 the threshold is the next number above all values. Cheaper than :func:`top_k` for few values.
    """
    excess = len(values) - k
    threshold = np.partition(values, excess)[excess] if k else np.nextafter(values.max(), np.float32(np.inf))
    is_kept = values > threshold
    ties = np.flatnonzero(values == threshold)
    is_kept[ties[: k - int(is_kept.sum())]] = True
    return is_kept, threshold
