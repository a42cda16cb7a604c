"""The channel graph as a circuit: one matrix per contraction, fixed wires between them.

In: a :class:`ChannelGraph`, compiled by ``fxprune.graph.circuits``. Out: a :class:`Circuit`, which counts
paths at channel resolution, for optimisers that ask thousands of times. At that resolution images are
periodic and positions alike, so that a kernel counts by the number of its weights alone, and all that lies
between two contractions is a constant linear map: mostly the identity, which costs nothing here. Each run is
one matrix-vector product per contraction and direction; nothing is taped or rescaled on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.graph import ir

__all__ = ["Circuit", "Closure", "Contraction", "Function", "Op", "Pass", "Wire"]

BAND = 32.0
"""Powers of two that a value may drift from one before it is rescaled; far inside the range of float32."""

Function = Callable[[Sequence[Tensor]], Tensor]


class Pass(NamedTuple):
    """One run: ``log_total`` is ln R per sample (``-inf`` without any path), and for every contraction of the
    circuit its inputs ``x`` and outputs ``y`` (rows x channels), with ``slope`` = d ln R / d output.

    d ln R / d count of a kernel (o, i) is the sum over rows of ``slope[:, o] * x[:, i]``.
    """

    log_total: float
    x: list[Tensor]
    y: list[Tensor]
    slope: list[Tensor]


@dataclass
class Wire:
    """``output = sum of gain * input[index]``; ``index`` is None where it is the identity."""

    output: int
    inputs: tuple[int, ...]
    indices: tuple[Tensor | None, ...]
    coefficients: tuple[float, ...]
    gains: tuple[float, ...] = ()


@dataclass
class Closure:
    """Any other constant linear map, differentiated by autograd."""

    output: int
    inputs: tuple[int, ...]
    function: Function
    gains: tuple[float, ...] = ()


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
    _matrix: Tensor | None = None
    _columns: Tensor = field(default_factory=lambda: torch.empty(0))
    _rows: Tensor = field(default_factory=lambda: torch.empty(0))

    def columns(self, matrix: Tensor) -> Tensor:
        """``matrix`` as (groups, out / groups, in / groups), or (out, in) where there is but one group."""
        if self.groups == 1:
            return matrix.t() if self.transposed else matrix
        apart = matrix.reshape(self.groups, -1, matrix.shape[1])
        return apart.transpose(1, 2) if self.transposed else apart

    def read(self, matrix: Tensor) -> None:
        """Takes ``matrix`` as the counts; views of it are made once, and see what is written to it later."""
        if matrix is not self._matrix:
            self._matrix = matrix
            self._columns = self.columns(self.operand(matrix))
            self._rows = self._columns.t() if self.groups == 1 else self._columns

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, flat, of inputs ``x``, flat."""
        if self.groups > 1:
            return (x.view(self.rows, self.groups, 1, -1) * self._columns).sum(-1).flatten()
        if self.rows == 1:
            return torch.mv(self._columns, x)
        return (x.view(self.rows, -1) @ self._rows).flatten()

    def backward(self, slope: Tensor) -> Tensor:
        """d ln R / d inputs, flat, from d ln R / d outputs, flat."""
        if self.groups > 1:
            return (slope.view(self.rows, self.groups, -1, 1) * self._columns).sum(-2).flatten()
        if self.rows == 1:
            return torch.mv(self._rows, slope)
        return (slope.view(self.rows, -1) @ self._columns).flatten()

    def spread(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Writes (or adds) the sum over rows of ``slope[:, o] * x[:, i]`` to ``out`` (shaped as counts)."""
        target = self.operand(out)
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


Op = Wire | Closure | Contraction


@dataclass
class Circuit:
    """What :func:`fxprune.graph.circuits.circuit` compiles; see :meth:`run`."""

    ops: list[Op]
    sources: list[tuple[int, Tensor]]
    outputs: list[tuple[int, Tensor]]
    samples: int
    kernels: dict[str, ir.KernelSet]
    dtype: torch.dtype = torch.float64
    contractions: list[Contraction] = field(default_factory=list)
    _powers: dict[int, float] = field(default_factory=dict)
    _base: float = 0.0
    _weights: list[tuple[int, Tensor]] = field(default_factory=list)
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.contractions = [op for op in self.ops if isinstance(op, Contraction)]

    def dense(self, name: str) -> Tensor:
        """Live weights of every kernel of ``name``: the counts of the dense network."""
        kernels = self.kernels[name]
        live = int(kernels.live_taps.sum()) if kernels.shape[2:] else 1
        return torch.full(kernels.shape[:2], float(live), dtype=self.dtype, device=self._device)

    def run(self, counts: Mapping[str, Tensor]) -> Pass:
        """Paths, with all that is needed for their derivatives.

        ``counts``: for every parameter the number of kept live weights in each kernel, shaped as its first
        two dimensions, in the circuit's ``dtype``, all on one device. Gives zero slopes where there is no
        path.
        """
        device = next(iter(counts.values())).device
        for op in self.contractions:
            op.read(counts[op.name])
        if not self._weights or device != self._device:
            self._device = device
            self.sources = [(index, x.to(device)) for index, x in self.sources]
            self.outputs = [(index, x.to(device)) for index, x in self.outputs]
            self._calibrate()
        values = self._forward()
        total = self._total(values)
        if not 2.0**-BAND < total < 2.0**BAND:
            self._calibrate()
            values = self._forward()
            total = self._total(values)
        x = [values[op.inputs[0]].view(op.rows, -1) for op in self.contractions]
        y = [values[op.output].view(op.rows, -1) for op in self.contractions]
        if not total > 0:
            return Pass(-math.inf, x, y, [torch.zeros_like(value) for value in y])
        log_total = math.log(total) + self._base * math.log(2) - math.log(self.samples)
        return Pass(log_total, x, y, self._backward(values, total))

    def _total(self, values: dict[int, Tensor]) -> float:
        return float(sum(torch.dot(weight, values[index]) for index, weight in self._weights))

    def _forward(self) -> dict[int, Tensor]:
        values = dict(self.sources)
        for op in self.ops:
            values[op.output] = self._step(op, values)
        return values

    def _step(self, op: Op, values: dict[int, Tensor]) -> Tensor:
        if isinstance(op, Contraction):
            y = op.forward(values[op.inputs[0]])
            return y if op.gains[0] == 1 else y * op.gains[0]
        if isinstance(op, Closure):
            scaled = [values[index] * gain for index, gain in zip(op.inputs, op.gains, strict=True)]
            return op.function(scaled)
        total: Tensor | None = None
        for source, index, gain in zip(op.inputs, op.indices, op.gains, strict=True):
            part = values[source] if index is None else values[source].index_select(0, index)
            if total is None:
                total = part if gain == 1 else part * gain
            else:
                total = torch.add(total, part, alpha=gain)
        assert total is not None, "a wire has an input"
        return total

    def _calibrate(self) -> None:
        """Chooses the power of two that each value is divided by, and the gains that follow from it.

        All that keeps within ``BAND`` of one takes over the power of its input, and then costs nothing.
        """
        values, powers = dict(self.sources), {index: 0.0 for index, _ in self.sources}
        for op in self.ops:
            live = [powers[index] for index in op.inputs if bool(values[index].any())]
            base = max(live, default=powers[op.inputs[0]])
            own = op.coefficients if isinstance(op, Wire) else (1.0,) * len(op.inputs)
            if isinstance(op, Wire) and len(op.inputs) == 1:
                base += math.log2(own[0])
            powers[op.output] = base
            self._set_gains(op, own, powers)
            result = self._step(op, values)
            top = float(result.max())
            if top > 0 and not -BAND < math.log2(top) < BAND:
                powers[op.output] += math.ceil(math.log2(top))
                self._set_gains(op, own, powers)
                result = self._step(op, values)
            values[op.output] = result
        self._base = max(
            (powers[index] for index, _ in self.outputs if bool(values[index].any())), default=0.0
        )
        self._weights = [
            (index, weight * 2.0 ** min(powers[index] - self._base, 100.0)) for index, weight in self.outputs
        ]
        total = self._total(values)
        if total > 0:  # or many outputs would leave the band at once, and each run calibrate
            shift = math.ceil(math.log2(total))
            self._base += shift
            self._weights = [(index, weight * 2.0**-shift) for index, weight in self._weights]

    def _set_gains(self, op: Op, own: Sequence[float], powers: dict[int, float]) -> None:
        # A dead input may stand at any power; bounded gains keep it finite until the next calibration.
        op.gains = tuple(
            coefficient
            if powers[index] == powers[op.output]
            else 1.0
            if len(own) == 1 and powers[op.output] == powers[index] + math.log2(coefficient)
            else coefficient * 2.0 ** max(-100.0, min(100.0, powers[index] - powers[op.output]))
            for index, coefficient in zip(op.inputs, own, strict=True)
        )

    def _backward(self, values: dict[int, Tensor], total: float) -> list[Tensor]:
        """d ln R / d output of every contraction (rows x channels), its gain included."""
        slopes: dict[int, Tensor] = {}

        def meet(index: int, slope: Tensor) -> None:
            slopes[index] = slopes[index] + slope if index in slopes else slope

        for index, weight in self._weights:
            meet(index, weight / total)
        found: list[Tensor] = []
        for op in reversed(self.ops):
            slope = slopes.pop(op.output, None)
            if isinstance(op, Contraction):
                if slope is None:
                    slope = torch.zeros_like(values[op.output])
                slope = slope if op.gains[0] == 1 else slope * op.gains[0]
                found.append(slope.view(op.rows, -1))
                meet(op.inputs[0], op.backward(slope))
            elif slope is not None and isinstance(op, Wire):
                for source, picked, gain in zip(op.inputs, op.indices, op.gains, strict=True):
                    part = slope if gain == 1 else slope * gain
                    if picked is not None:
                        part = torch.zeros_like(values[source]).index_add_(0, picked, part)
                    meet(source, part)
            elif slope is not None and isinstance(op, Closure):
                for source, part in zip(op.inputs, _pulled(op, values, slope), strict=True):
                    meet(source, part)
        return found[::-1]


def _pulled(op: Closure, values: dict[int, Tensor], slope: Tensor) -> list[Tensor]:
    inputs = [values[index].detach().requires_grad_() for index in op.inputs]
    with torch.enable_grad():
        scaled = [x * gain for x, gain in zip(inputs, op.gains, strict=True)]
        output = op.function(scaled)
    return list(torch.autograd.grad(output, inputs, slope))
