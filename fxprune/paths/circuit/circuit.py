"""The channel graph as a circuit: one matrix per contraction, fixed wires between them.

In: a :class:`ChannelGraph`, compiled by ``fxprune.paths.circuit.compile``. Out: a :class:`Circuit`, which
counts
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
from fxprune.paths.circuit.parts import Closure, Contraction, Kept, Op, Presence, Sparse, Wire

__all__ = ["Circuit", "Pass"]

BAND = 32.0
"""Powers of two that a value may drift from one before it is rescaled; far inside the range of float32."""


class Pass(NamedTuple):
    """One run: ``log_total`` is ln R per sample (``-inf`` without any path), and for every contraction of the
    circuit its inputs ``x`` and outputs ``y``, with ``slope`` = d ln R / d output; flat, see
    :meth:`Contraction.by_row`.

    d ln R / d count of a kernel (o, i) is the sum over rows of ``slope[:, o] * x[:, i]``.
    """

    log_total: float
    x: list[Tensor]
    y: list[Tensor]
    slope: list[Tensor]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _marked(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


@dataclass
class Circuit:
    """What :func:`fxprune.paths.circuit.compile.circuit` compiles; see :meth:`run`."""

    ops: list[Op]
    sources: list[tuple[int, Tensor]]
    outputs: list[tuple[int, Tensor]]
    samples: int
    kernels: dict[str, ir.KernelSet]
    dtype: torch.dtype = torch.float64
    presences: list[Presence] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    calibrations: int = 0
    _present: dict[int, Tensor] = field(default_factory=dict)
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _powers: dict[int, float] = field(default_factory=dict)
    _base: float = 0.0
    _weights: list[tuple[int, Tensor]] = field(default_factory=list)
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.contractions = [op for op in self.ops if isinstance(op, Contraction)]

    @property
    def is_fixed(self) -> bool:
        """Whether each run is the same operations, none of which autograd differentiates."""
        return not self.presences and not any(isinstance(op, Closure) for op in self.ops)

    def dense(self, name: str) -> Tensor:
        """Live weights of every kernel of ``name``: the counts of the dense network."""
        kernels = self.kernels[name]
        live = int(kernels.live_taps.sum()) if kernels.shape[2:] else 1
        return torch.full(kernels.shape[:2], float(live), dtype=self.dtype, device=self._device)

    def run(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """Paths, with all that is needed for their derivatives.

        ``counts``: for every parameter the number of kept live weights in each kernel, shaped as its first
        two dimensions, in the circuit's ``dtype``, or the places of the kept, all on one device. Gives zero
        slopes where there is no path.
        """
        self._meet(counts)
        values = self._forward()
        total = float(self._sum(values))
        if not 2.0**-BAND < total < 2.0**BAND:
            self._calibrate()
            values = self._forward()
            total = float(self._sum(values))
        if not total > 0:
            x, y = self._ends(values)
            return Pass(-math.inf, x, y, [torch.zeros_like(value) for value in y])
        log_total = math.log(total) + self._base * math.log(2) - math.log(self.samples)
        return Pass(log_total, *self._ends(values), self._backward(values, 1 / total))

    def run_ahead(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """The same as :meth:`run`, which must have been called before, without waiting for the device.

        ``log_total`` is NaN: nobody looks at R, so that scales stay as they are. Slopes are zero where R is
        zero, or has left the range of numbers.
        """
        self._meet(counts)
        values = self._forward()
        total = self._sum(values)
        is_usable = (total > 0) & (total < math.inf)
        share = torch.where(is_usable, 1 / total, torch.zeros_like(total))
        return Pass(math.nan, *self._ends(values), self._backward(values, share))

    def marks(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """Which ends of which kernels are on a path: zeros and ones for ``x``, ``y`` and ``slope``.

        Exact where numbers are not: of branches with far fewer paths than others, no slope may be left.
        ``log_total`` is NaN.
        """
        self._meet(counts)
        values = self._forward(_marked)
        return Pass(math.nan, *self._ends(values), self._backward(values, 1.0, _marked))

    def _meet(self, counts: Mapping[str, Tensor | Kept]) -> None:
        """Takes the counts, on whatever device they are."""
        device = next(iter(counts.values())).device
        for op in self.contractions:
            op.read(counts[op.name])
        is_new = not self._weights or device != self._device
        if is_new:
            self._device = device
            self.sources = [(index, x.to(device)) for index, x in self.sources]
            self.outputs = [(index, x.to(device)) for index, x in self.outputs]
            for part in self.ops:
                if isinstance(part, (Sparse, Wire)):
                    part.move(device)
        self._mark(counts)
        if is_new:
            self._calibrate()

    def _ends(self, values: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x = [values[op.inputs[0]] for op in self.contractions]
        return x, [values[op.output] for op in self.contractions]

    def _mark(self, counts: Mapping[str, Tensor | Kept]) -> None:
        """Which values are present, under the products that ask."""
        if not self.presences:
            return
        one = torch.ones((), dtype=self.dtype, device=self._device)
        for op in self.presences:
            found = op.function([self._present[index] for index in op.inputs], one)
            if op.contraction is not None:
                count = counts[op.contraction.name]
                if isinstance(count, Kept):
                    op.contraction.read(count)
                    self._present[op.output] = (op.contraction.forward(found) > 0.5).to(self.dtype)
                    continue
                kept = self._kept.get(op.contraction.name)
                if kept is None or kept.device != count.device:
                    kept = self._kept[op.contraction.name] = torch.empty_like(count)
                op.contraction.read(torch.gt(count, 0, out=kept))
                found = op.contraction.forward(found)
            self._present[op.output] = (found > 0.5).to(self.dtype)

    def _sum(self, values: dict[int, Tensor]) -> Tensor:
        parts = [torch.dot(weight, values[index]) for index, weight in self._weights]
        return sum(parts[1:], parts[0])

    def _forward(self, settle: Callable[[Tensor], Tensor] = _unchanged) -> dict[int, Tensor]:
        values = {index: settle(x) for index, x in self.sources}
        for op in self.ops:
            values[op.output] = settle(self._step(op, values))
        return values

    def _step(self, op: Op, values: dict[int, Tensor]) -> Tensor:
        if isinstance(op, Contraction):
            y = op.forward(values[op.inputs[0]])
            return y if op.gains[0] == 1 else y * op.gains[0]
        if isinstance(op, Sparse):
            return op.forward([values[index] for index in op.inputs])
        if isinstance(op, Closure):
            scaled = [values[index] * gain for index, gain in zip(op.inputs, op.gains, strict=True)]
            return op.function([*scaled, *self._marks(op)])
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

        ``calibrations`` counts how often.

        All that keeps within ``BAND`` of one takes over the power of its input, and then costs nothing.
        """
        self.calibrations += 1
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
        total = float(self._sum(values))
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

    def _backward(
        self,
        values: dict[int, Tensor],
        share: float | Tensor,
        settle: Callable[[Tensor], Tensor] = _unchanged,
    ) -> list[Tensor]:
        """d ln R / d output of every contraction, its gain included; ``share``: 1 / R."""
        slopes: dict[int, Tensor] = {}

        def meet(index: int, slope: Tensor) -> None:
            slopes[index] = settle(slopes[index] + slope if index in slopes else slope)

        for index, weight in self._weights:
            meet(index, weight * share)
        found: list[Tensor] = []
        for op in reversed(self.ops):
            slope = slopes.pop(op.output, None)
            if isinstance(op, Contraction):
                if slope is None:
                    slope = torch.zeros_like(values[op.output])
                slope = settle(slope if op.gains[0] == 1 else slope * op.gains[0])
                found.append(slope)
                meet(op.inputs[0], op.backward(slope))
            elif slope is not None and isinstance(op, Wire):
                for source, picked, gain in zip(op.inputs, op.indices, op.gains, strict=True):
                    part = slope if gain == 1 else slope * gain
                    if picked is not None:
                        part = torch.zeros_like(values[source]).index_add_(0, picked, part)
                    meet(source, part)
            elif slope is not None and isinstance(op, Sparse):
                inputs = [values[index] for index in op.inputs]
                for source, part in zip(op.inputs, op.backward(slope, inputs), strict=True):
                    meet(source, part)
            elif slope is not None and isinstance(op, Closure):
                for source, part in zip(op.inputs, self._pulled(op, values, slope), strict=True):
                    meet(source, part)
        return found[::-1]

    def _marks(self, op: Closure) -> list[Tensor]:
        return [self._present[index] for index in op.present]

    def _pulled(self, op: Closure, values: dict[int, Tensor], slope: Tensor) -> list[Tensor]:
        inputs = [values[index].detach().requires_grad_() for index in op.inputs]
        with torch.enable_grad():
            scaled = [x * gain for x, gain in zip(inputs, op.gains, strict=True)]
            output = op.function([*scaled, *self._marks(op)])
        return list(torch.autograd.grad(output, inputs, slope))
