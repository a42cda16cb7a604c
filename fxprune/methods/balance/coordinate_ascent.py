"""Sweeps: all layers of a network rewritten for most paths, one after another, in the course of one count.

A circuit and a number of weights per parameter come in; counts of kept weights per kernel with many paths go
out. While all other layers stay, R is linear in the weights of one layer, so that its best weights are those
of the largest d ln R / d count = (paths on) x (paths to). A run of the circuit meets every layer with both at
hand: on the way forward with the paths to it as they are by now and the paths on from the run before, on the
way back the other way round. Rewriting it there and then is exact coordinate ascent, two rounds for the price
of one count. Started from the dense network under noise that dies away, every call finds another optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxprune.methods.balance.layer_moves import oriented
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.parts import Contraction, Op

__all__ = ["Sweeps"]

Floats = NDArray[np.float64]

NOISE = 0.5
"""Standard deviation of the first sweep's noise, per channel, in ln of its paths."""
WITHIN = 0.3
"""Noise of a kernel, in units of that of a channel."""
WAKING = 0.3
"""How often a channel that leads nowhere is tried in the place of one that does."""
COOLING, REFINING = 5, 6
"""Runs with noise, and those without it at most."""
STALLED = 1e-5
"""A gain in ln R after which another run is not worth its time."""


@dataclass
class _Met(Contraction):
    """A contraction that is handed over, with what it meets, before its matrix is used."""

    visit: Callable[[_Met], None] | None = None
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


class Sweeps:
    """``counts``: kept weights of every kernel, by parameter; ``caps``: how many each may have. ``fixed``:
    counts of all other parameters. Parameters keep as many weights as in ``counts``; those that the network
    reads more than once, or in pieces, keep just these.
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
        self.edges = {**fixed, **{name: count.clone() for name, count in self.start.items()}}
        self.oriented = {
            name: tuple(oriented(x[name].numpy(), circuit.kernels[name]) for x in (self.edges, self.caps))
            for name in self.free
        }
        self.pruned = {name for name in self.free if not bool(self.caps[name].all())}
        self.noise = 0.0
        ops = [self._met(op) if isinstance(op, Contraction) else replace(op) for op in circuit.ops]
        self.circuit = Circuit(
            ops,
            circuit.sources,
            circuit.outputs,
            circuit.samples,
            circuit.kernels,
            circuit.dtype,
            circuit.presences,
        )

    def _met(self, op: Contraction) -> Op:
        return _Met(
            op.output, op.inputs, op.name, op.operand, op.groups, op.transposed, op.rows, op.is_whole,
            visit=self._rewrite if op.name in self.free else None,
        )  # fmt: skip

    def drawn(self, start: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Counts of many paths, others at every call; near ``start``, if that is given."""
        for op in self.circuit.contractions:
            assert isinstance(op, _Met)
            op.slope = None
        for name, count in (start or self.start).items():
            self.edges[name].copy_(count)
        last = -np.inf
        for turn in range(COOLING + REFINING):
            self.noise = NOISE * max(0.0, 1 - turn / COOLING)
            found = self.circuit.run(self.edges).log_total
            if turn > COOLING and found < last + STALLED:
                break
            last = found
        return {name: self._whole(name) for name in self.start}

    def _rewrite(self, op: _Met) -> None:
        """The best weights of a layer as things stand, give or take the noise."""
        assert op.x is not None
        assert op.slope is not None
        x = op.x.view(op.rows, op.groups, -1).double().numpy()
        slope = op.slope.view(op.rows, op.groups, -1).double().numpy()
        to, on = _anywhere(x), _anywhere(slope)
        x, slope = x[:, :, to], slope[:, :, on]
        if self.noise:
            x = x * self._shaking(x)
            slope = slope * self._shaking(slope)
            dead = self._dead(on, op)
            if dead is not None:
                on = np.append(on, dead)
                slope = np.append(slope, slope[:, :, [self.random.integers(slope.shape[2])]], 2)
        gain = slope.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
        number = self.numbers[op.name]
        count, cap = self.oriented[op.name]
        if op.name in self.pruned:
            gain *= cap[:, on[:, None], to] > 0
        if self.noise:
            gain *= np.exp(WITHIN * self.noise * self.random.standard_normal(gain.shape))
        best = _best(gain.ravel(), number)
        if not len(best):
            return
        best, i = np.divmod(best, len(to))
        group, o = np.divmod(best, len(on))
        place = group, on[o], to[i]
        count[...] = 0
        count[place] = _poured(cap[place], number)

    def _shaking(self, values: Floats) -> Floats:
        noise: Floats = np.exp(self.noise * self.random.standard_normal(values.shape[1:]))
        return noise

    def _dead(self, on: NDArray[np.intp], op: _Met) -> int | None:
        """Now and then an output that leads nowhere."""
        size = self.oriented[op.name][0].shape[1]
        if self.random.random() > WAKING or not 0 < len(on) < size:
            return None
        dead = np.ones(size, dtype=bool)
        dead[on] = False
        places = dead.nonzero()[0]
        return int(places[self.random.integers(len(places))])

    def _whole(self, name: str) -> Tensor:
        """The counts of a parameter, what no path asked for put anywhere."""
        count = self.edges[name].clone()
        left = self.numbers[name] - round(float(count.sum()))
        if left > 0:
            flat, room = count.numpy().reshape(-1), (self.caps[name] - count).numpy().reshape(-1)
            places = self.random.permutation(np.flatnonzero(room > 0))
            flat[places] += _poured(room[places], left)
        return count


def _anywhere(values: Floats) -> NDArray[np.intp]:
    """The channels that any row and group has a number for."""
    flat = values.reshape(-1, values.shape[2])
    total: Floats = flat[0] if len(flat) == 1 else flat.sum(0)
    return total.nonzero()[0]


def _best(worth: Floats, number: int) -> NDArray[np.intp]:
    """The places of the ``number`` largest above zero, or of fewer, largest first."""
    places = (worth > 0).nonzero()[0]
    if len(places) > 4 * number:
        places = places[np.argpartition(-worth[places], number)[:number]]
    return places[np.argsort(-worth[places], kind="stable")]


def _poured(caps: Floats, number: int) -> Floats:
    """``number`` in all, in the first places as many as they take."""
    before = np.cumsum(caps) - caps
    poured: Floats = np.minimum(np.maximum(number - before, 0), caps)
    return poured
