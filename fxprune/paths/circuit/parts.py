"""The parts of a circuit: one matrix per contraction, and fixed linear maps between them.

Each part computes its output from its inputs (``forward``), and the slopes of its inputs from that of its
output (``backward``). A *slope* is d ln R / d value. All values are flat. Gains are set by the circuit.
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
    "Function",
    "Kept",
    "Part",
    "Presence",
    "PresenceFunction",
    "Sparse",
    "SparseMatrix",
    "Wire",
]

Function = Callable[[Sequence[Tensor]], Tensor]
"""A linear function of flat tensors."""
PresenceFunction = Callable[[Sequence[Tensor], Tensor], Tensor]
"""The presence of a value, from those of its inputs, and a scalar 1 that has the dtype and the device."""


@dataclass
class Wire:
    """``output = sum of gain * input[index]``; ``index`` is None where it is the identity."""

    output: int
    inputs: tuple[int, ...]
    indices: tuple[Tensor | None, ...]
    coefficients: tuple[float, ...]
    gains: tuple[float, ...] = ()

    def move(self, device: torch.device) -> None:
        """Move to another device, in place."""
        self.indices = tuple(None if index is None else index.to(device) for index in self.indices)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output."""
        total: Tensor | None = None
        for x, index, gain in zip(inputs, self.indices, self.gains, strict=True):
            term = x if index is None else x.index_select(0, index)
            if total is None:
                total = term if gain == 1 else term * gain
            else:
                total = torch.add(total, term, alpha=gain)
        assert total is not None, "a wire has an input"
        return total

    def backward(self, slope: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The slope of each input."""
        found = []
        for x, index, gain in zip(inputs, self.indices, self.gains, strict=True):
            term = slope if gain == 1 else slope * gain
            found.append(term if index is None else torch.zeros_like(x).index_add_(0, index, term))
        return found


class SparseMatrix(NamedTuple):
    """A sparse matrix: ``value[k]`` at row ``out[k]`` and column ``into[k]``."""

    out: Tensor
    into: Tensor
    value: Tensor


@dataclass
class Sparse:
    """``output`` (of ``size`` entries) ``= sum of gain * matrix @ input``."""

    output: int
    inputs: tuple[int, ...]
    matrices: tuple[SparseMatrix, ...]
    size: int
    gains: tuple[float, ...] = ()

    def move(self, device: torch.device) -> None:
        """Move to another device, in place."""
        self.matrices = tuple(SparseMatrix(*(x.to(device) for x in entries)) for entries in self.matrices)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output."""
        total = inputs[0].new_zeros(self.size)
        for x, entries, gain in zip(inputs, self.matrices, self.gains, strict=True):
            total.index_add_(0, entries.out, x.index_select(0, entries.into) * entries.value, alpha=gain)
        return total

    def backward(self, slope: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The slope of each input."""
        found = []
        for x, entries, gain in zip(inputs, self.matrices, self.gains, strict=True):
            part = slope.index_select(0, entries.out) * entries.value
            found.append(torch.zeros_like(x).index_add_(0, entries.into, part, alpha=gain))
        return found


@dataclass
class Closure:
    """Any other linear map: a large one, or one that depends on presence. Autograd differentiates it.

    ``function`` gets the inputs, and then the presence (0 or 1) of the values ``present``: a product passes
    the paths through one factor where the other is present.
    """

    output: int
    inputs: tuple[int, ...]
    function: Function
    present: tuple[int, ...] = ()
    gains: tuple[float, ...] = ()

    def forward(self, inputs: Sequence[Tensor], presence: Sequence[Tensor]) -> Tensor:
        """The output."""
        return self.function([*(x * gain for x, gain in zip(inputs, self.gains, strict=True)), *presence])

    def backward(self, slope: Tensor, inputs: Sequence[Tensor], presence: Sequence[Tensor]) -> list[Tensor]:
        """The slope of each input."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            output = self.forward(leaves, presence)
        return list(torch.autograd.grad(output, leaves, slope))


@dataclass(frozen=True, eq=False)
class Kept:
    """A matrix of zeros and ones, given by the places of its ones: row ``out[k]`` and column ``into[k]``.

    It can stand for the counts of a layer with one weight per kernel and one group that is read as a whole.
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
        """Slopes of inputs (rows x inputs), from those of outputs (rows x outputs)."""
        part = slope.index_select(1, self.out)
        return slope.new_zeros(len(slope), self.shape[1]).index_add_(1, self.into, part)


@dataclass
class Contraction:
    """``output = gain * input @ matrix``, where the matrix is a view of the counts of parameter ``name``.

    ``operand`` makes that view of a tensor of shape (out, in / groups), or (in, out / groups) where
    ``transposed``; ``is_whole`` says that it is the tensor itself. ``rows``: the number of positions that
    differ; the matrix is applied to each of them. The gain is applied by the circuit.
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
        """Bind ``matrix`` as the counts. Views of it are made once, and see what is written to it later."""
        if isinstance(matrix, Kept):
            self._matrix = matrix
        elif matrix is not self._matrix:
            self._matrix = matrix
            self._columns = self.columns(self.operand(matrix))
            self._rows = self._columns.t() if self.groups == 1 else self._columns

    def forward(self, x: Tensor) -> Tensor:
        """The output, without the gain."""
        if isinstance(self._matrix, Kept):
            return self._matrix.forward(self.by_row(x)).flatten()
        if self.groups > 1:
            return (x.view(self.rows, self.groups, 1, -1) * self._columns).sum(-1).flatten()
        if self.rows == 1:
            return torch.mv(self._columns, x)
        return (self.by_row(x) @ self._rows).flatten()

    def backward(self, slope: Tensor) -> Tensor:
        """The slope of the input, without the gain."""
        if isinstance(self._matrix, Kept):
            return self._matrix.backward(self.by_row(slope)).flatten()
        if self.groups > 1:
            return (slope.view(self.rows, self.groups, -1, 1) * self._columns).sum(-2).flatten()
        if self.rows == 1:
            return torch.mv(self._rows, slope)
        return (self.by_row(slope) @ self._columns).flatten()

    def by_row(self, values: Tensor) -> Tensor:
        """View a flat input, output or slope as rows x channels."""
        return values.view(self.rows, -1)

    def spread(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Write (or add) d ln R / d counts to ``out``: the sum over rows of ``slope[:, o] * x[:, i]``."""
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


Part = Wire | Sparse | Closure | Contraction


@dataclass
class Presence:
    """The presence of value ``output``: 1 where the result of ``function`` is above 1/2.

    A ``contraction`` is applied to the result first, with 1 for every kernel that has any weight left.
    """

    output: int
    inputs: tuple[int, ...]
    function: PresenceFunction
    contraction: Contraction | None = None
