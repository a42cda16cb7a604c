"""Count paths at channel resolution, thousands of times: one matrix per contraction, fixed maps in between.

At channel resolution images are periodic and positions alike, so that a kernel counts by its number of
weights alone, and everything between two contractions is a constant linear map. Most of these maps are the
identity, which costs nothing here. A run is one matrix-vector product per contraction and direction. Nothing
is recorded for autograd, and nothing is rescaled: each value stands at a fixed power of two, chosen when the
circuit is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.circuit.parts import Closure, Contraction, Kept, Part, Presence, Sparse, Wire

__all__ = ["Circuit", "Pass"]

BAND = 32.0
"""Powers of two that a value may drift from one before it is rescaled; far inside the range of float32."""


class Pass(NamedTuple):
    """The result of one run.

    ``log_total`` is ln R per sample (``-inf`` without any path). ``x`` and ``y`` are the inputs and outputs
    of every contraction of the circuit, ``slope`` is d ln R / d output; all are flat, see
    :meth:`Contraction.by_row`. d ln R / d count of a kernel (o, i) is the sum over rows of ``slope[:, o] *
    x[:, i]``.
    """

    log_total: float
    x: list[Tensor]
    y: list[Tensor]
    slope: list[Tensor]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _is_positive(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


@dataclass
class Circuit:
    """A compiled graph; see :func:`fxprune.paths.circuit.compile.circuit`, and :meth:`run`.

    ``sources``: values that are given, with their numbers. ``outputs``: values whose entries add up to R,
    with the multiplicity of each entry. ``calibrations``: how often powers of two have been chosen so far.
    """

    parts: list[Part]
    sources: list[tuple[int, Tensor]]
    outputs: list[tuple[int, Tensor]]
    samples: int
    kernels: dict[str, ir.KernelSet]
    dtype: torch.dtype = torch.float64
    presences: list[Presence] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    calibrations: int = 0
    _present: dict[int, Tensor] = field(default_factory=dict)
    _has_weights: dict[str, Tensor] = field(default_factory=dict)
    _output_power: float = 0.0
    _output_weights: list[tuple[int, Tensor]] = field(default_factory=list)
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.contractions = [part for part in self.parts if isinstance(part, Contraction)]

    @property
    def is_fixed(self) -> bool:
        """Whether every run does the same operations, without autograd."""
        return not self.presences and not any(isinstance(part, Closure) for part in self.parts)

    def dense(self, name: str) -> Tensor:
        """The counts of the dense network: the number of live weights in every kernel of ``name``."""
        kernels = self.kernels[name]
        live = int(kernels.live_taps.sum()) if kernels.shape[2:] else 1
        return torch.full(kernels.shape[:2], float(live), dtype=self.dtype, device=self._device)

    # -- runs -------------------------------------------------------------------------------------------
    def run(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """Count paths, with everything that their derivatives are made of.

        ``counts``: for every parameter the number of kept live weights in each kernel, shaped as its first
        two dimensions, in the circuit's ``dtype``, or the places of the kept weights; all on one device.
        Slopes are zero where there is no path.
        """
        self._bind_counts(counts)
        values = self._forward()
        total = float(self._sum_outputs(values))
        if not 2.0**-BAND < total < 2.0**BAND:
            self._calibrate()
            values = self._forward()
            total = float(self._sum_outputs(values))
        if not total > 0:
            x, y = self._ends(values)
            return Pass(-math.inf, x, y, [torch.zeros_like(value) for value in y])
        log_total = math.log(total) + self._output_power * math.log(2) - math.log(self.samples)
        return Pass(log_total, *self._ends(values), self._backward(values, 1 / total))

    def run_ahead(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """The same as :meth:`run`, without waiting for the device. :meth:`run` must have been called before.

        Powers of two stay as they are. ``log_total`` is NaN; slopes are zero where R is zero or not finite.
        """
        self._bind_counts(counts)
        values = self._forward()
        total = self._sum_outputs(values)
        is_usable = (total > 0) & (total < math.inf)
        share = torch.where(is_usable, 1 / total, torch.zeros_like(total))
        return Pass(math.nan, *self._ends(values), self._backward(values, share))

    def on_paths(self, counts: Mapping[str, Tensor | Kept]) -> Pass:
        """Test which inputs and outputs of contractions lie on a path: zeros and ones for all of a pass.

        Exact, where the numbers of a run may underflow: those of branches with far fewer paths than others.
        ``log_total`` is NaN.
        """
        self._bind_counts(counts)
        values = self._forward(_is_positive)
        return Pass(math.nan, *self._ends(values), self._backward(values, 1.0, _is_positive))

    def _ends(self, values: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of all contractions."""
        x = [values[part.inputs[0]] for part in self.contractions]
        return x, [values[part.output] for part in self.contractions]

    # -- counts -----------------------------------------------------------------------------------------
    def _bind_counts(self, counts: Mapping[str, Tensor | Kept]) -> None:
        """Bind kernel counts; move constants to their device; calibrate on first use."""
        device = next(iter(counts.values())).device
        for part in self.contractions:
            part.read(counts[part.name])
        is_new = not self._output_weights or device != self._device
        if is_new:
            self._move(device)
        self._update_presence(counts)
        if is_new:
            self._calibrate()

    def _move(self, device: torch.device) -> None:
        self._device = device
        self.sources = [(index, x.to(device)) for index, x in self.sources]
        self.outputs = [(index, x.to(device)) for index, x in self.outputs]
        for part in self.parts:
            if isinstance(part, (Sparse, Wire)):
                part.move(device)

    def _update_presence(self, counts: Mapping[str, Tensor | Kept]) -> None:
        """Compute the presence of the values that products ask about."""
        if not self.presences:
            return
        one = torch.ones((), dtype=self.dtype, device=self._device)
        for presence in self.presences:
            found = presence.function([self._present[index] for index in presence.inputs], one)
            if presence.contraction is not None:
                found = self._contract_presence(presence.contraction, counts, found)
            self._present[presence.output] = (found > 0.5).to(self.dtype)

    def _contract_presence(
        self, contraction: Contraction, counts: Mapping[str, Tensor | Kept], x: Tensor
    ) -> Tensor:
        """Contract ``x`` with 1 for every kernel that has any weight left."""
        count = counts[contraction.name]
        if not isinstance(count, Kept):
            buffer = self._has_weights.get(contraction.name)
            if buffer is None or buffer.device != count.device:
                buffer = self._has_weights[contraction.name] = torch.empty_like(count)
            count = torch.gt(count, 0, out=buffer)
        contraction.read(count)
        return contraction.forward(x)

    # -- forward ----------------------------------------------------------------------------------------
    def _forward(self, then: Callable[[Tensor], Tensor] = _unchanged) -> dict[int, Tensor]:
        """All values; ``then`` is applied to each as soon as it is computed."""
        values = {index: then(x) for index, x in self.sources}
        for part in self.parts:
            values[part.output] = then(self._output(part, values))
        return values

    def _output(self, part: Part, values: dict[int, Tensor]) -> Tensor:
        if isinstance(part, Contraction):
            y = part.forward(values[part.inputs[0]])
            return y if part.gains[0] == 1 else y * part.gains[0]
        inputs = [values[index] for index in part.inputs]
        if isinstance(part, Closure):
            return part.forward(inputs, [self._present[index] for index in part.present])
        return part.forward(inputs)

    def _sum_outputs(self, values: dict[int, Tensor]) -> Tensor:
        """R, at the power of two ``_output_power``."""
        terms = [torch.dot(weight, values[index]) for index, weight in self._output_weights]
        return sum(terms[1:], terms[0])

    # -- backward ---------------------------------------------------------------------------------------
    def _backward(
        self,
        values: dict[int, Tensor],
        share: float | Tensor,
        then: Callable[[Tensor], Tensor] = _unchanged,
    ) -> list[Tensor]:
        """d ln R / d output of every contraction, its gain included.

        ``share``: 1 / R. ``then`` is applied to each slope as soon as it is computed.
        """
        slopes: dict[int, Tensor] = {}

        def add(index: int, slope: Tensor) -> None:
            slopes[index] = then(slopes[index] + slope if index in slopes else slope)

        for index, weight in self._output_weights:
            add(index, weight * share)
        found: list[Tensor] = []
        for part in reversed(self.parts):
            slope = slopes.pop(part.output, None)
            if isinstance(part, Contraction):
                if slope is None:
                    slope = torch.zeros_like(values[part.output])
                slope = then(slope if part.gains[0] == 1 else slope * part.gains[0])
                found.append(slope)
                add(part.inputs[0], part.backward(slope))
            elif slope is not None:
                for index, input_slope in zip(
                    part.inputs, self._input_slopes(part, slope, values), strict=True
                ):
                    add(index, input_slope)
        return found[::-1]

    def _input_slopes(
        self, part: Wire | Sparse | Closure, slope: Tensor, values: dict[int, Tensor]
    ) -> list[Tensor]:
        inputs = [values[index] for index in part.inputs]
        if isinstance(part, Closure):
            return part.backward(slope, inputs, [self._present[index] for index in part.present])
        return part.backward(slope, inputs)

    # -- calibration ------------------------------------------------------------------------------------
    def _calibrate(self) -> None:
        """Choose the power of two that each value stands at, and the gains that follow from it.

        A value that stays within ``BAND`` of one takes over the power of its input; its gain is then 1, which
        costs nothing.
        """
        self.calibrations += 1
        values, powers = dict(self.sources), {index: 0.0 for index, _ in self.sources}
        for part in self.parts:
            values[part.output] = self._calibrate_part(part, values, powers)
        self._calibrate_outputs(values, powers)

    def _calibrate_part(self, part: Part, values: dict[int, Tensor], powers: dict[int, float]) -> Tensor:
        """Choose the power of the output of ``part``; returns the output at this power.

        Inputs that are zero throughout do not count for the power.
        """
        live = [powers[index] for index in part.inputs if bool(values[index].any())]
        coefficients = part.coefficients if isinstance(part, Wire) else (1.0,) * len(part.inputs)
        power = max(live, default=powers[part.inputs[0]])
        if isinstance(part, Wire) and len(part.inputs) == 1:
            power += math.log2(coefficients[0])
        powers[part.output] = power
        _set_gains(part, coefficients, powers)
        result = self._output(part, values)
        top = float(result.max())
        if top > 0 and not -BAND < math.log2(top) < BAND:
            powers[part.output] += math.ceil(math.log2(top))
            _set_gains(part, coefficients, powers)
            result = self._output(part, values)
        return result

    def _calibrate_outputs(self, values: dict[int, Tensor], powers: dict[int, float]) -> None:
        """Choose the power of R, so that R itself is about one."""
        live = [powers[index] for index, _ in self.outputs if bool(values[index].any())]
        self._output_power = max(live, default=0.0)
        self._output_weights = [
            (index, weight * 2.0 ** min(powers[index] - self._output_power, 100.0))
            for index, weight in self.outputs
        ]
        total = float(self._sum_outputs(values))
        if total > 0:  # else many outputs would leave the band at once, and each run calibrate
            shift = math.ceil(math.log2(total))
            self._output_power += shift
            self._output_weights = [(index, weight * 2.0**-shift) for index, weight in self._output_weights]


def _set_gains(part: Part, coefficients: Sequence[float], powers: dict[int, float]) -> None:
    """Set the gain of each input: its coefficient, and the step from its power to that of the output."""
    part.gains = tuple(
        _gain(coefficient, powers[index], powers[part.output], len(coefficients) == 1)
        for index, coefficient in zip(part.inputs, coefficients, strict=True)
    )


def _gain(coefficient: float, before: float, after: float, is_only_input: bool) -> float:
    if before == after:
        return coefficient
    if is_only_input and after == before + math.log2(coefficient):
        return 1.0
    # An input of zeros may stand at any power; bounded gains keep it finite until the next calibration.
    step: float = 2.0 ** max(-100.0, min(100.0, before - after))
    return coefficient * step
