"""Prune the lowest scores among the weights that are left, round after round, in one pass each.

This is a variant of :func:`fxprune.sparsity.select.select`, tested equal to it, for scores that are the
product of a number per weight, given once, and a factor of the round. Scores are never stored. They are
computed in chunks that stay in the cache; a sample gives a bound that few scores are below, and only those
are looked at further. Pruned weights are NaN, which is not below any bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import sample_stride

__all__ = ["Dense", "Gain", "Outer", "Survivors"]

_CHUNK = 1 << 21
"""Scores that are made at a time: few enough for a cache, enough for the overhead of calls not to count."""
_SAMPLE = 1 << 16
_LANES = 8
_LARGE = 4
"""Where more than one weight in so many goes, selection among all scores is cheaper than looking for it."""


class Gain(Protocol):
    """Factors of the weights of one parameter, finite and not negative; one per weight or per kernel."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Factors of ``[start:stop]`` of the first dimension, (rows, columns, taps or 1), in float32."""

    def at(self, kernels: Tensor, taps: Tensor) -> Tensor:
        """Factors of single weights: of tap ``taps`` of kernel ``kernels``, flat over two dimensions."""


@dataclass(frozen=True)
class Dense:
    """Factors that are given as they are: (rows, columns, taps or 1)."""

    factors: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a view of the factors."""
        return self.factors[start:stop]

    def at(self, kernels: Tensor, taps: Tensor) -> Tensor:
        """Index the factors."""
        table = self.factors.reshape(-1, self.factors.shape[-1])
        return table[kernels, taps if table.shape[1] > 1 else 0]


@dataclass(frozen=True)
class Outer:
    """``then(sum over r of left[r, row] * right[r, column])``, one per kernel."""

    left: Tensor
    right: Tensor
    then: Callable[[Tensor], Tensor] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute an outer product, or a matrix product, of some rows."""
        left = self.left[:, start:stop]
        found = torch.outer(left[0], self.right[0]) if len(left) == 1 else left.t() @ self.right
        return (found if self.then is None else self.then(found)).unsqueeze(-1)

    def at(self, kernels: Tensor, taps: Tensor) -> Tensor:
        """Compute single entries of the product."""
        columns = self.right.shape[1]
        row = kernels.div(columns, rounding_mode="floor")
        found = (self.left[:, row] * self.right[:, kernels - row * columns]).sum(0)
        return found if self.then is None else self.then(found)


@dataclass(frozen=True)
class _Sample:
    """Some weights of a parameter, by flat index, kernel and tap."""

    index: Tensor
    kernels: Tensor
    taps: Tensor


class Survivors:
    """The weights that are left. ``values``: NaN where pruned, ``left``: how many, by parameter.

    ``values``: float32, contiguous, finite and not negative, of at least two dimensions; they are taken over,
    not copied. ``masks``: which are left at the start.

    >>> weights = Survivors({"a": torch.tensor([[3.0, 1.0, 2.0]])}, {"a": torch.ones(1, 3, dtype=torch.bool)})
    >>> weights.reduce({"a": Dense(torch.ones(1, 3, 1))}, Budget(total=2, sizes={"a": 3}))
    {'a': tensor([1])}
    >>> weights.masks()
    {'a': tensor([[ True, False,  True]])}
    """

    def __init__(self, values: Mapping[str, Tensor], masks: Masks) -> None:
        self.values = {name: value.masked_fill_(~masks[name], math.nan) for name, value in values.items()}
        self.left = kept(masks)
        # Seen as (rows, columns, taps); writing to the one writes to the other.
        self._kernels = {name: value.view(*value.shape[:2], -1) for name, value in values.items()}
        stride = sample_stride(sum(value.numel() for value in values.values()), _SAMPLE)
        self._samples = {name: _sampled(kernels, stride) for name, kernels in self._kernels.items()}

    def masks(self) -> Masks:
        """Return masks of the weights that are left."""
        return {name: ~value.isnan() for name, value in self.values.items()}

    def scores(self, gains: Mapping[str, Gain]) -> dict[str, Tensor]:
        """Compute all scores, zero where pruned."""
        found = {}
        for name, kernels in self._kernels.items():
            score = (kernels * gains[name].rows(0, len(kernels))).view_as(self.values[name])
            found[name] = score.masked_fill_(self.values[name].isnan(), 0.0)
        return found

    def is_large(self, budget: Budget) -> bool:
        """Whether so many weights have to go that ``select`` among ``scores`` is the cheaper way."""
        return any(_LARGE * number > self._among(names) for names, number in self._contests(budget))

    def restrict(self, masks: Masks) -> dict[str, Tensor]:
        """Prune whatever ``masks`` do not keep; return flat indices of what was pruned, in order."""
        gone = {name: (~masks[name] & ~value.isnan()) for name, value in self.values.items()}
        return self._prune({name: where.flatten().nonzero().flatten() for name, where in gone.items()})

    def reduce(self, gains: Mapping[str, Gain], budget: Budget) -> dict[str, Tensor]:
        """Prune the lowest scores, of equal ones those at the highest index, down to ``budget``.

        Returns flat indices of what was pruned, in order. A budget above what is left prunes nothing.
        """
        pruned: dict[str, Tensor] = {}
        for names, number in self._contests(budget):
            if number > 0:
                pruned |= self._lowest(names, number, gains)
        return self._prune(pruned)

    def _contests(self, budget: Budget) -> list[tuple[list[str], int]]:
        """List the parameters that compete, with the number of their weights that have to go."""
        if budget.layers is None:
            names = list(self.values)
            return [(names, self._among(names) - budget.total)]
        return [([name], self.left[name] - number) for name, number in budget.layers.items()]

    def _among(self, names: Sequence[str]) -> int:
        return sum(self.left[name] for name in names)

    def _prune(self, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, index in pruned.items():
            self.values[name].view(-1)[index] = math.nan
            self.left[name] -= len(index)
        return pruned

    def _lowest(self, names: Sequence[str], number: int, gains: Mapping[str, Gain]) -> dict[str, Tensor]:
        margin = 1
        while True:
            bound = self._bound(names, number, gains, margin)
            found = [_at_most(self._kernels[name], gains[name], bound) for name in names]
            if sum(len(index) for index, _ in found) >= number or bound == math.inf:
                break
            margin *= 4  # the sample misled
        scores = torch.cat([score for _, score in found])
        boundary = scores.kthvalue(number).values
        gone = scores < boundary
        ties = (scores == boundary).nonzero().flatten()
        gone[ties[len(ties) - number + int(gone.count_nonzero()) :]] = True
        parts = torch.split(gone, [len(index) for index, _ in found])
        return {name: index[part] for name, (index, _), part in zip(names, found, parts, strict=True)}

    def _bound(self, names: Sequence[str], number: int, gains: Mapping[str, Gain], margin: int) -> float:
        """Estimate, from the sample, a score that at least ``number`` weights do not exceed, and few more."""
        drawn = []
        for name in names:
            sample = self._samples[name]
            value = self.values[name].view(-1)[sample.index]
            drawn.append(value * gains[name].at(sample.kernels, sample.taps))
        some = torch.cat(drawn)
        some = some[some >= 0]  # not those that are pruned
        share = number / self._among(names)
        # Four standard deviations of the sample's rank.
        place = int(share * len(some)) + margin * (8 + int(4 * math.sqrt(len(some) * share * (1 - share))))
        return float(some.kthvalue(place).values) if place <= len(some) else math.inf


def _sampled(kernels: Tensor, stride: int) -> _Sample:
    index = torch.arange(0, kernels.numel(), stride, device=kernels.device)
    kernel = index.div(kernels.shape[2], rounding_mode="floor")
    return _Sample(index, kernel, index - kernel * kernels.shape[2])


def _at_most(kernels: Tensor, gain: Gain, bound: float) -> tuple[Tensor, Tensor]:
    """Find the weights that are left and score at most ``bound``: flat indices, in order, and scores."""
    rows, columns, taps = kernels.shape
    step = max(1, _CHUNK // (columns * taps))
    buffer = kernels.new_empty(-(-min(step, rows) * columns * taps // _LANES) * _LANES)
    limit = int(torch.tensor(bound, dtype=buffer.dtype).view(torch.int32))
    indices, scores = [], []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        size = (stop - start) * columns * taps
        padded = buffer[: -(-size // _LANES) * _LANES]
        torch.mul(
            kernels[start:stop], gain.rows(start, stop), out=padded[:size].view(stop - start, columns, taps)
        )
        padded[size:] = math.nan
        index, score = _low(padded.view(_LANES, -1), bound, limit)
        indices.append(index + start * columns * taps)
        scores.append(score)
    return torch.cat(indices), torch.cat(scores)


def _low(lanes: Tensor, bound: float, limit: int) -> tuple[Tensor, Tensor]:
    """Find the entries that are at most ``bound``: flat indices, in order, and values.

    Lanes are searched as one, by the minimum of their bits, read as integers: those of floats that are not
    negative have the same order, with NaN above all. ``limit``: the bits of ``bound``.
    """
    places = (lanes.view(torch.int32).amin(0) <= limit).nonzero().flatten()
    some = lanes.index_select(1, places)
    chosen = (some <= bound).flatten().nonzero().flatten()
    lane = chosen.div(max(1, len(places)), rounding_mode="floor")
    index = places[chosen - lane * len(places)] + lane * lanes.shape[1]
    return index, some.flatten()[chosen]
