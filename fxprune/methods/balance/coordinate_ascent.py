"""Find counts of kept weights per kernel with many paths, by coordinate ascent over the layers.

R is linear in the weights of one layer, so that its best weights, all others given, are those of the largest
d ln R / d count = (paths on from the output) * (paths to the input). A run of the circuit visits every layer
with both at hand: forward with the paths to it as they are now and the paths on from the last backward pass,
then backward with the two exchanged. Rewriting the layer at this moment is exact, so that one run makes two
rounds over all layers. Noise that cools down leads every call to another optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxprune.methods.balance.layer_moves import Floats, oriented
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.parts import Contraction, Part

__all__ = ["CoordinateAscent"]

CHANNEL_NOISE = 0.5
"""Standard deviation of the first run's noise on ln of the paths of a channel."""
KERNEL_NOISE = 0.3
"""Standard deviation of the noise on ln of the paths of a kernel, relative to that of a channel."""
WAKE_PROBABILITY = 0.3
"""Probability that a rewritten layer may use one output without paths on from it."""
NOISY_RUNS, EXACT_RUNS = 5, 6
"""Runs with noise, and those without it at most."""
LEAST_GAIN = 1e-5
"""A gain in ln R below which the runs end."""


@dataclass
class _VisitedContraction(Contraction):
    """A contraction that calls ``visit`` with its present ``x`` and ``slope`` before its matrix is used."""

    visit: Callable[[_VisitedContraction], None] | None = None
    x: Tensor | None = None
    slope: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        if self.visit is not None and self.slope is not None:
            self.visit(self)
        return super().forward(x)

    def backward(self, slope: Tensor) -> Tensor:
        self.slope = slope
        if self.visit is not None:
            self.visit(self)
        return super().backward(slope)


class CoordinateAscent:
    """Maximise ln R over counts, every layer keeping as many weights as in ``counts``.

    ``counts``: kept weights of every kernel, by parameter; ``caps``: how many each may have. ``fixed``:
    counts of all other parameters. Parameters that the network reads more than once, or in pieces, keep their
    counts.
    """

    def __init__(
        self,
        circuit: Circuit,
        counts: Mapping[str, Tensor],
        caps: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        random: np.random.Generator,
    ) -> None:
        self.caps, self.random = dict(caps), random
        self.numbers = {name: round(float(count.sum())) for name, count in counts.items()}
        reads = [op.name for op in circuit.contractions]
        self.free = {op.name for op in circuit.contractions if op.is_whole and reads.count(op.name) == 1}
        self.free &= counts.keys()
        self.start = {name: caps[name] if name in self.free else count for name, count in counts.items()}
        self.counts = {**fixed, **{name: count.clone() for name, count in self.start.items()}}
        # Views of counts and caps, of shape (groups, outputs, inputs).
        self._oriented = {
            name: tuple(oriented(x[name].numpy(), circuit.kernels[name]) for x in (self.counts, self.caps))
            for name in self.free
        }
        self._has_zero_caps = {name for name in self.free if not bool(self.caps[name].all())}
        self._noise_scale = 0.0
        ops = [self._visited(op) if isinstance(op, Contraction) else replace(op) for op in circuit.parts]
        self.circuit = Circuit(
            ops,
            circuit.sources,
            circuit.outputs,
            circuit.samples,
            circuit.kernels,
            circuit.dtype,
            circuit.presences,
        )

    def _visited(self, op: Contraction) -> Part:
        return _VisitedContraction(
            op.output, op.inputs, op.name, op.operand, op.groups, op.transposed, op.rows, op.is_whole,
            visit=self._rewrite if op.name in self.free else None,
        )  # fmt: skip

    def draw(self, start: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return counts of many paths, different ones at every call; from ``start``, or the dense network."""
        for op in self.circuit.contractions:
            assert isinstance(op, _VisitedContraction)
            op.slope = None
        for name, count in (start or self.start).items():
            self.counts[name].copy_(count)
        last = -np.inf
        for run in range(NOISY_RUNS + EXACT_RUNS):
            self._noise_scale = CHANNEL_NOISE * max(0.0, 1 - run / NOISY_RUNS)
            log_paths = self.circuit.run(self.counts).log_total
            if run > NOISY_RUNS and log_paths < last + LEAST_GAIN:
                break
            last = log_paths
        return {name: self._complete(name) for name in self.start}

    def _rewrite(self, op: _VisitedContraction) -> None:
        """Replace the counts of a layer by the best ones for its present ``x`` and ``slope``, under noise."""
        assert op.x is not None
        assert op.slope is not None
        x = op.x.view(op.rows, op.groups, -1).double().numpy()
        slope = op.slope.view(op.rows, op.groups, -1).double().numpy()
        inputs, outputs = _nonzero_channels(x), _nonzero_channels(slope)
        x, slope = x[:, :, inputs], slope[:, :, outputs]
        if self._noise_scale:
            x = x * self._noise(x)
            slope = slope * self._noise(slope)
            dead = self._draw_dead_output(outputs, op)
            if dead is not None:  # it takes the slope of another output
                outputs = np.append(outputs, dead)
                slope = np.append(slope, slope[:, :, [self.random.integers(slope.shape[2])]], 2)
        # By group: gain[o, i] = sum over positions of slope[o] * x[i].
        gain = slope.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
        number = self.numbers[op.name]
        count, caps = self._oriented[op.name]
        if op.name in self._has_zero_caps:
            gain *= caps[:, outputs[:, None], inputs] > 0
        if self._noise_scale:
            gain *= np.exp(KERNEL_NOISE * self._noise_scale * self.random.standard_normal(gain.shape))
        best = _largest_positive(gain.ravel(), number)
        if not len(best):
            return
        best, i = np.divmod(best, len(inputs))
        group, o = np.divmod(best, len(outputs))
        kernels = group, outputs[o], inputs[i]
        count[...] = 0
        count[kernels] = fill_in_order(caps[kernels], number)

    def _noise(self, values: Floats) -> Floats:
        """Draw log-normal factors of the channels of ``values`` (positions, groups, channels)."""
        noise: Floats = np.exp(self._noise_scale * self.random.standard_normal(values.shape[1:]))
        return noise

    def _draw_dead_output(self, outputs: NDArray[np.intp], op: _VisitedContraction) -> int | None:
        """Draw an output that is not among ``outputs``, or, mostly, none."""
        size = self._oriented[op.name][0].shape[1]
        if self.random.random() > WAKE_PROBABILITY or not 0 < len(outputs) < size:
            return None
        is_dead = np.ones(size, dtype=bool)
        is_dead[outputs] = False
        dead = is_dead.nonzero()[0]
        return int(dead[self.random.integers(len(dead))])

    def _complete(self, name: str) -> Tensor:
        """Return the counts of a parameter, its remaining weights distributed at random."""
        count = self.counts[name].clone()
        left = self.numbers[name] - round(float(count.sum()))
        if left > 0:
            flat, room = count.numpy().reshape(-1), (self.caps[name] - count).numpy().reshape(-1)
            places = self.random.permutation(np.flatnonzero(room > 0))
            flat[places] += fill_in_order(room[places], left)
        return count


def _nonzero_channels(values: Floats) -> NDArray[np.intp]:
    """Return the channels that are not zero at every position and in every group."""
    flat = values.reshape(-1, values.shape[2])
    total: Floats = flat[0] if len(flat) == 1 else flat.sum(0)
    return total.nonzero()[0]


def _largest_positive(values: Floats, number: int) -> NDArray[np.intp]:
    """Return the indices of at least the ``number`` largest values above zero, in descending order."""
    places = (values > 0).nonzero()[0]
    if len(places) > 4 * number:
        places = places[np.argpartition(-values[places], number)[:number]]
    return places[np.argsort(-values[places], kind="stable")]


def fill_in_order(caps: Floats, number: int) -> Floats:
    """Distribute ``number`` in all over the places in order, each taking as many as its cap allows."""
    before = np.cumsum(caps) - caps
    filled: Floats = np.minimum(np.maximum(number - before, 0), caps)
    return filled
