"""Choose the weights of one layer while all others stay.

R is linear in the weights of one layer: each weight of the kernel (o, i) adds R * G[o, i] to R, with
G[o, i] = d ln R / d count[o, i], whatever the other weights of the layer. So the best counts that keep given
channels in use follow from sorting G. Arrays of kernels are of shape (groups, outputs, inputs) of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxprune.graph.ir import KernelSet

__all__ = ["Flags", "Floats", "MovePlan", "cover_channels", "fill_by_gain", "group_shape", "oriented"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
PATHS_OVER_ZERO = 1e-6
"""Added to the weight of paths, so that weights with a gain go before those without, whatever the target."""


@dataclass(frozen=True)
class MovePlan:
    """Hold the channels that a rewritten layer covers, drawn by chance.

    ``keep``: probability of a channel in use. ``reach``: of one not in use that has paths to it (for inputs)
    or on from it (for outputs). ``wake``: of any other output. ``noise``: standard deviation of ln gain.
    ``spread``: give every weight a kernel of its own, where possible.
    """

    keep: float
    reach: float
    wake: float
    noise: float
    spread: bool

    @classmethod
    def draw(cls, random: np.random.Generator, node_share: float) -> MovePlan:
        """Draw a plan; in half of ``node_share`` of the cases one that tries to gain nodes."""
        for_nodes = random.random() < node_share / 2
        kind = random.integers(2, 4) if for_nodes else random.integers(4)
        noise = float(random.choice([0.0, 0.0, 0.3, 1.0]))
        keep, reach, wake = 1.0, 0.0, 0.0
        if kind == 1:
            keep = float(random.choice([0.0, 0.5, 0.8, 0.95]))
        elif kind == 2:
            reach = float(random.choice([0.1, 0.5, 1.0]))
        elif kind == 3:
            reach, wake = float(random.choice([0.1, 1.0])), float(random.choice([0.02, 0.1, 0.3, 1.0]))
        return cls(keep, reach, wake, noise, bool(random.random() < 0.3))

    @property
    def wakes(self) -> bool:
        """Whether outputs without a path on from them may be covered."""
        return self.wake > 0

    def draw_channels(self, used: Flags, reachable: Flags, random: np.random.Generator) -> Flags:
        """Draw the channels to cover, from those in use and those that could be."""
        chance = random.random(used.shape)
        return np.where(used, chance < self.keep, reachable & (chance < self.reach))


def group_shape(kernels: KernelSet) -> tuple[int, int, int]:
    """Return (groups, outputs of a group, inputs of a group)."""
    first, second = kernels.shape[0] // kernels.groups, kernels.shape[1]
    return (kernels.groups, second, first) if kernels.transposed else (kernels.groups, first, second)


def oriented(matrix: NDArray[np.generic], kernels: KernelSet) -> Floats:
    """Return a view (groups, outputs, inputs) of a matrix shaped as the parameter's first two dimensions."""
    by_group = matrix.reshape(kernels.groups, -1, matrix.shape[1])
    return by_group.transpose(0, 2, 1) if kernels.transposed else by_group  # type: ignore[return-value]


def cover_channels(
    inputs: Flags, outputs: Flags, gain: Floats, caps: Floats, number: int, random: np.random.Generator
) -> Flags:
    """Choose few kernels, at most ``number``, that together touch the flagged ``inputs`` and ``outputs``.

    A kernel that covers an input and an output at once saves a weight: max(inputs, outputs) kernels do. As G
    is a product of a number per input and one per output, pairing the channels in descending order of these
    is worth most; channels left over get the partner of the highest gain. ``caps``: weights that each kernel
    may have. Where there are too many, random ones are left out.
    """
    chosen = np.zeros(gain.shape, dtype=bool)
    for group in np.flatnonzero(inputs.any(1) | outputs.any(1)):
        worth = np.where(caps[group] > 0, gain[group], 0.0)
        rows = np.flatnonzero(outputs[group])
        columns = np.flatnonzero(inputs[group])
        rows = rows[np.argsort(-worth[rows].max(1), kind="stable")]
        columns = columns[np.argsort(-worth[:, columns].max(0), kind="stable")]
        pairs = min(len(rows), len(columns))
        kernels = list(zip(rows[:pairs], columns[:pairs], strict=True))
        kernels += [(row, worth[row].argmax()) for row in rows[pairs:]]
        kernels += [(worth[:, column].argmax(), column) for column in columns[pairs:]]
        if kernels:
            at = np.array(kernels)
            chosen[group, at[:, 0], at[:, 1]] = True
    chosen &= caps > 0
    excess = int(chosen.sum()) - number
    if excess > 0:
        places = np.flatnonzero(chosen)
        chosen.flat[random.choice(places, excess, replace=False)] = False
    return chosen


def fill_by_gain(
    covered: Flags, gain: Floats, caps: Floats, number: int, *, path_weight: float, kernel_bonus: float
) -> Floats:
    """Return counts of ``number`` weights: one in every covered kernel, the others where they are worth most.

    In a kernel with gain G the first weight is worth path_weight * G + kernel_bonus (nothing more, if G is
    0), every other weight path_weight * G. As worth falls along a kernel, taking the highest of all is
    optimal for what is covered. ``caps``: weights that each kernel may have.
    """
    counts = covered.astype(np.float64)
    left = number - int(np.count_nonzero(covered))
    if left <= 0:
        return counts
    first, other = worth = np.empty((2, gain.size))
    np.multiply(gain.ravel(), path_weight + PATHS_OVER_ZERO, out=other)
    np.multiply(gain.ravel() > 0, kernel_bonus, out=first)
    first += other
    first[(covered | (caps < 1)).ravel()] = -1.0
    other[(caps < 2).ravel()] = -1.0
    # Candidates below gain.size stand for a first weight, the others for all further weights of a kernel.
    candidates = _largest(worth.ravel(), left)
    kernel = candidates % gain.size
    sizes = np.where(candidates < gain.size, 1.0, caps.ravel()[kernel] - 1)
    before = np.cumsum(sizes) - sizes
    np.add.at(counts.ravel(), kernel, np.clip(left - before, 0, sizes))
    return counts


def _largest(values: Floats, number: int) -> NDArray[np.intp]:
    """Return the indices of the ``number`` largest values, in descending order, of those not below zero."""
    positive = values[values > 0]
    if len(positive) > number:  # a partition with many equal values is slow: zeros stay out of it
        found = np.flatnonzero(values >= np.partition(positive, -number)[-number])
    else:
        zeros = np.flatnonzero(values == 0)[: number - len(positive)]
        found = np.concatenate([np.flatnonzero(values > 0), zeros])
    return found[np.argsort(-values[found], kind="stable")[:number]]
