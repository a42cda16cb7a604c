"""Links: how the entries of an op's input lead to the entries of its output, ready for random walks.

In: the steps of a program and non-negative sizes of the weights. Out: for every live input of every op a
:class:`Link`, which takes many walkers across at once, forward or backward. Entries are flat indices of
reduced tensors. A walker that meets no way on is lost; the caller sees it as ``-1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Choice", "EdgeLink", "Link", "edges_of"]

DENSE_LIMIT = 2_000_000_000  # entries of the largest Jacobian that is looked through, row by row


class Link(Protocol):
    """One live input of one op."""

    def forward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Output entries for input ``entries``, and the weights passed (``-1`` for none)."""

    def backward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Input entries for output ``entries``, and the weights passed (``-1`` for none)."""

    def spread(self, fed: Tensor) -> Tensor:
        """Which outputs are reached from the inputs ``fed`` (bool)."""

    def gather(self, feeding: Tensor) -> Tensor:
        """Which inputs reach the outputs ``feeding`` (bool)."""

    def within(self, fed: Tensor, feeding: Tensor) -> None:
        """Leaves only what leads from inputs ``fed`` to outputs ``feeding``."""


class Choice:
    """Draws one of the items of a row, with probability proportional to its size, for many rows at once.

    ``rows`` (sorted, int64) and ``sizes`` (non-negative) of the items; ``number`` of rows. The cumulative
    shares of all rows follow one another in one ascending array, so that a draw is one binary search.
    """

    def __init__(self, rows: Tensor, sizes: Tensor, number: int) -> None:
        sizes = sizes.double()
        totals = torch.zeros(number, dtype=torch.float64).index_add_(0, rows, sizes)
        before = torch.cat([totals.new_zeros(1), totals.cumsum(0)[:-1]])
        share = (sizes.cumsum(0) - before[rows]) / totals[rows].clamp(min=1e-300)
        self.cumulative = rows + share.clamp(0, 1)
        self.open = totals > 0
        self.items = len(rows)

    def draw(self, rows: Tensor, chance: Tensor) -> Tensor:
        """An item of each of ``rows``; ``-1`` where the row has none."""
        if not self.items:
            return torch.full_like(rows, -1)
        item = torch.searchsorted(self.cumulative, rows + chance, right=True).clamp(max=self.items - 1)
        return item.where(self.open[rows], -1)


class EdgeLink:
    """A link given by its edges: from input entry ``source`` to output entry ``target``, of some size."""

    def __init__(self, source: Tensor, target: Tensor, sizes: Tensor, inputs: int, outputs: int) -> None:
        self.edges = source, target, sizes
        self.inputs, self.outputs = inputs, outputs
        self._index()

    def _index(self) -> None:
        source, target, sizes = self.edges
        onward, back = source.argsort(stable=True), target.argsort(stable=True)
        self.targets, self.sources = target[onward], source[back]
        self.onward = Choice(source[onward], sizes[onward], self.inputs)
        self.back = Choice(target[back], sizes[back], self.outputs)

    def forward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        item = self.onward.draw(entries, draw(len(entries)))
        return _picked(self.targets, item), torch.full_like(entries, -1)

    def backward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        item = self.back.draw(entries, draw(len(entries)))
        return _picked(self.sources, item), torch.full_like(entries, -1)

    def spread(self, fed: Tensor) -> Tensor:
        source, target, _ = self.edges
        reached = torch.zeros(self.outputs, dtype=torch.bool)
        reached[target[fed[source]]] = True
        return reached

    def gather(self, feeding: Tensor) -> Tensor:
        source, target, _ = self.edges
        found = torch.zeros(self.inputs, dtype=torch.bool)
        found[source[feeding[target]]] = True
        return found

    def within(self, fed: Tensor, feeding: Tensor) -> None:
        source, target, _ = self.edges
        used = fed[source] & feeding[target]
        if not bool(used.all()):
            self.edges = tuple(part[used] for part in self.edges)  # type: ignore[assignment]
            self._index()


def _picked(values: Tensor, item: Tensor) -> Tensor:
    if not len(values):
        return item
    return values[item.clamp(min=0)].where(item >= 0, -1)


def edges_of(apply: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> EdgeLink:
    """The non-zero coefficients of a linear function of a reduced tensor of ``shape``, as edges.

    Most ops move entries: each output has one input (a gather, a broadcast), or each input one output (a
    reduction). Both are read off one run on labels, and checked on random numbers; anything else is
    differentiated row by row.

    Raises:
        ValueError: neither holds, and there are too many coefficients to look at.
    """
    ones = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    inputs = ones.numel()
    with torch.enable_grad():
        out = apply(ones)
    outputs = out.numel()
    generator = torch.Generator().manual_seed(0x5EED)
    noise = torch.rand(inputs, generator=generator, dtype=torch.float64) + 1

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return apply(x.reshape(shape)).flatten()

    def turned(x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(out, ones, x.reshape(out.shape), retain_graph=True)
        return found.flatten()

    def single(count: Tensor, labels: Tensor, check: Tensor, noise: Tensor) -> Tensor | None:
        """The only partner of each entry, if there is one."""
        partner = (labels / count.clamp(min=1e-300) - 1).round().long().clamp(0, len(noise) - 1)
        fits = torch.allclose(check, count * noise[partner], rtol=1e-9, atol=0)
        return partner if fits else None

    counts = out.detach().flatten()
    label = torch.arange(1, inputs + 1, dtype=torch.float64)
    partner = single(counts, run(label), run(noise), noise)
    if partner is not None:
        used = counts > 0
        return EdgeLink(partner[used], used.nonzero().flatten(), counts[used], inputs, outputs)
    counts = turned(torch.ones(outputs, dtype=torch.float64))
    label = torch.arange(1, outputs + 1, dtype=torch.float64)
    noise = torch.rand(outputs, generator=generator, dtype=torch.float64) + 1
    partner = single(counts, turned(label), turned(noise), noise)
    if partner is not None:
        used = counts > 0
        return EdgeLink(used.nonzero().flatten(), partner[used], counts[used], inputs, outputs)
    if inputs * outputs > DENSE_LIMIT:
        raise ValueError(f"an op has {inputs} x {outputs} channels and positions: too many for walks")
    return _looked_through(out, ones, inputs, outputs)


def _looked_through(out: Tensor, x: Tensor, inputs: int, outputs: int) -> EdgeLink:
    step = max(1, 4_000_000 // max(inputs, outputs))
    parts = []
    for start in range(0, outputs, step):
        size = min(step, outputs - start)
        rows = torch.zeros(size, outputs, dtype=torch.float64)
        rows[torch.arange(size), torch.arange(start, start + size)] = 1
        (found,) = torch.autograd.grad(
            out, x, rows.reshape(size, *out.shape), retain_graph=True, is_grads_batched=True
        )
        found = found.reshape(size, inputs)
        row, column = found.nonzero(as_tuple=True)
        parts.append((column, row + start, found[row, column]))
    source, target, sizes = (torch.cat(column) for column in zip(*parts, strict=True))
    return EdgeLink(source, target, sizes, inputs, outputs)


@dataclass(frozen=True)
class Members:
    """The entries of every class of one axis: ``order[first[c] : first[c] + count[c]]``."""

    index: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, index: Tensor, classes: int) -> Members:
        count = torch.bincount(index, minlength=classes)
        return cls(index, index.argsort(stable=True), count.cumsum(0) - count, count)

    def pick(self, classes: Tensor, chance: Tensor) -> Tensor:
        """A member of each class, uniformly."""
        return self.order[self.first[classes] + (chance * self.count[classes]).long()]
