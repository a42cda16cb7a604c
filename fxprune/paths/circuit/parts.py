"""The parts of a circuit: one matrix per contraction, and the fixed maps between them.

In: nothing; these are plain data with the little arithmetic that each has of its own, made by
``fxprune.paths.circuit.compile`` and run by :class:`fxprune.paths.circuit.circuit.Circuit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Closure",
    "Contraction",
    "Entries",
    "Function",
    "Kept",
    "Marking",
    "Op",
    "Presence",
    "Sparse",
    "Wire",
]

Function = Callable[[Sequence[Tensor]], Tensor]
Marking = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass
class Wire:
    """``output = sum of gain * input[index]``; ``index`` is None where it is the identity."""

    output: int
    inputs: tuple[int, ...]
    indices: tuple[Tensor | None, ...]
    coefficients: tuple[float, ...]
    gains: tuple[float, ...] = ()

    def move(self, device: torch.device) -> None:
        """To another device, in place."""
        self.indices = tuple(None if index is None else index.to(device) for index in self.indices)


class Entries(NamedTuple):
    """A sparse matrix: ``value[k]`` at row ``out[k]`` and column ``into[k]``."""

    out: Tensor
    into: Tensor
    value: Tensor


@dataclass
class Sparse:
    """``output`` (of ``size`` entries) ``= sum of gain * matrix @ input``."""

    output: int
    inputs: tuple[int, ...]
    matrices: tuple[Entries, ...]
    size: int
    gains: tuple[float, ...] = ()

    def move(self, device: torch.device) -> None:
        """To another device, in place."""
        self.matrices = tuple(Entries(*(x.to(device) for x in entries)) for entries in self.matrices)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, of its inputs."""
        total = inputs[0].new_zeros(self.size)
        for x, entries, gain in zip(inputs, self.matrices, self.gains, strict=True):
            total.index_add_(0, entries.out, x.index_select(0, entries.into) * entries.value, alpha=gain)
        return total

    def backward(self, slope: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """d ln R / d inputs, from d ln R / d output."""
        found = []
        for x, entries, gain in zip(inputs, self.matrices, self.gains, strict=True):
            part = slope.index_select(0, entries.out) * entries.value
            found.append(torch.zeros_like(x).index_add_(0, entries.into, part, alpha=gain))
        return found


@dataclass
class Closure:
    """Any other linear map, of many entries or not constant, differentiated by autograd.

    ``function`` gets the inputs, and after them which entries of the values ``present`` are not Zero (0 or
    1): the factors of a product, which passes on the paths through one where the other is present.
    """

    output: int
    inputs: tuple[int, ...]
    function: Function
    present: tuple[int, ...] = ()
    gains: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Kept:
    """A matrix of counts by the places of its ones, all else being zero: ``out[k]`` and ``into[k]``.

    It serves layers with one weight per kernel that are read whole, in one group.
    """

    out: Tensor
    into: Tensor
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.out.device

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (rows x outputs) of inputs ``x`` (rows x inputs)."""
        return x.new_zeros(len(x), self.shape[0]).index_add_(1, self.out, x.index_select(1, self.into))

    def backward(self, slope: Tensor) -> Tensor:
        """d ln R / d inputs, from d ln R / d outputs."""
        part = slope.index_select(1, self.out)
        return slope.new_zeros(len(slope), self.shape[1]).index_add_(1, self.into, part)


@dataclass
class Contraction:
    """``output = gain * input @ matrix``, the matrix being a view of the counts of parameter ``name``.

    ``operand`` gives that view of any tensor of shape (out, in / groups), or (in, out / groups) where
    ``transposed``; ``is_whole`` says that it is the tensor itself. ``rows``: positions that are told apart.
    """

    output: int
    inputs: tuple[int, ...]
    name: str
    operand: Callable[[Tensor], Tensor]
    groups: int
    transposed: bool
    rows: int
    is_whole: bool
    gains: tuple[float, ...] = (1.0,)
    _matrix: Tensor | Kept | None = None
    _columns: Tensor = field(default_factory=lambda: torch.empty(0))
    _rows: Tensor = field(default_factory=lambda: torch.empty(0))

    def columns(self, matrix: Tensor) -> Tensor:
        """``matrix`` as (groups, out / groups, in / groups), or (out, in) where there is but one group."""
        if self.groups == 1:
            return matrix.t() if self.transposed else matrix
        apart = matrix.reshape(self.groups, -1, matrix.shape[1])
        return apart.transpose(1, 2) if self.transposed else apart

    def read(self, matrix: Tensor | Kept) -> None:
        """Takes ``matrix`` as the counts; views of it are made once, and see what is written to it later."""
        if isinstance(matrix, Kept):
            self._matrix = matrix
        elif matrix is not self._matrix:
            self._matrix = matrix
            self._columns = self.columns(self.operand(matrix))
            self._rows = self._columns.t() if self.groups == 1 else self._columns

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, flat, of inputs ``x``, flat."""
        if isinstance(self._matrix, Kept):
            return self._matrix.forward(self.by_row(x)).flatten()
        if self.groups > 1:
            return (x.view(self.rows, self.groups, 1, -1) * self._columns).sum(-1).flatten()
        if self.rows == 1:
            return torch.mv(self._columns, x)
        return (self.by_row(x) @ self._rows).flatten()

    def backward(self, slope: Tensor) -> Tensor:
        """d ln R / d inputs, flat, from d ln R / d outputs, flat."""
        if isinstance(self._matrix, Kept):
            return self._matrix.backward(self.by_row(slope)).flatten()
        if self.groups > 1:
            return (slope.view(self.rows, self.groups, -1, 1) * self._columns).sum(-2).flatten()
        if self.rows == 1:
            return torch.mv(self._rows, slope)
        return (self.by_row(slope) @ self._columns).flatten()

    def by_row(self, values: Tensor) -> Tensor:
        """Inputs, outputs or slopes, flat, as rows x channels."""
        return values.view(self.rows, -1)

    def spread(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Writes (or adds) the sum over rows of ``slope[:, o] * x[:, i]`` to ``out`` (shaped as counts)."""
        target, slope, x = self.operand(out), self.by_row(slope), self.by_row(x)
        if self.groups > 1:
            rows = (self.rows, self.groups, -1)
            a, b = (x, slope) if self.transposed else (slope, x)
            product = (a.view(rows).unsqueeze(-1) * b.view(rows).unsqueeze(-2)).sum(0).view(target.shape)
            target.add_(product) if add else target.copy_(product)
            return
        a, b = (x, slope) if self.transposed else (slope, x)
        if add:
            target.addmm_(a.t(), b)
        elif self.rows == 1 and target.is_contiguous():
            torch.outer(a[0], b[0], out=target)
        elif target.is_contiguous():
            torch.mm(a.t(), b, out=target)
        else:
            target.copy_(a.t() @ b)


Op = Wire | Sparse | Closure | Contraction


@dataclass
class Presence:
    """Where ``output`` is not Zero: 1 where ``function`` of that of ``inputs`` (and of a scalar one, for the
    dtype and device) is above 1/2. A ``contraction`` follows, with the kernels that have any weight left.
    """

    output: int
    inputs: tuple[int, ...]
    function: Marking
    contraction: Contraction | None = None
