"""Exchange: masks improved by rewriting one or two layers at a time, every result counted exactly.

Numbers of kept weights per kernel come in; numbers that are better by an objective in ln paths, ln nodes
and ln kernels go out, every layer still keeping as many as before. While all other layers stay, R is linear
in the weights of one layer: a weight of the kernel (o, i) is worth G_oi = d ln R / d count, exactly, and the
best choice that covers given channels is a matter of sorting. Which channels to cover is what the search
tries out: those in use (nothing is lost then), fewer of them (paths gather in the rest), or more of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprune.graph.ir import KernelSet
from fxprune.methods.balance.target import GUARD, Aim
from fxprune.methods.dpai.objective import Figures, count_nodes
from fxprune.paths.circuit.circuit import Circuit, Pass

__all__ = ["Exchange", "cover", "oriented"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
FAINT = 1e-9
"""What the better end of a kernel counts where no path passes yet."""


@dataclass
class _State:
    """One counted choice: what a run gave, and how many nodes and kernels more the budget of each layer
    allows.
    """

    found: Pass
    figures: Figures
    missing: dict[str, int]
    spare: dict[str, int]


class Exchange:
    """``counts``: kept weights of every kernel, by parameter, in its first two dimensions. ``caps``: how many
    each kernel may have. ``fixed``: counts of parameters that are not to be changed.
    """

    def __init__(
        self,
        circuit: Circuit,
        counts: Mapping[str, Tensor],
        caps: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        aim: Aim,
        generator: torch.Generator,
    ) -> None:
        self.circuit, self.fixed = circuit, dict(fixed)
        self.counts = {name: count.to(circuit.dtype).clone() for name, count in counts.items()}
        self.caps = {name: cap.to(circuit.dtype) for name, cap in caps.items()}
        self.aim = aim
        seed = int(torch.randint(2**31, (), generator=generator))
        self.random = np.random.default_rng(seed)
        self.uses: dict[str, list[int]] = {name: [] for name in counts}
        for place, op in enumerate(circuit.contractions):
            if op.name in self.uses:
                self.uses[op.name].append(place)
        self.order = [name for name in self.uses if self.uses[name]]
        self.weights = {name: int(count.sum()) for name, count in self.counts.items()}
        self.most = {
            name: min(number, circuit.kernels[name].out_space.size) for name, number in self.weights.items()
        }
        # Layers with one use and one number per channel, one after another.
        self.plain = {name: places[0] for name, places in self.uses.items() if self._is_plain(places)}
        shapes = [circuit.kernels[name].shape for name in self.plain]
        self.inputs = list(pairwise(accumulate((shape[1] for shape in shapes), initial=0)))
        self.outputs = list(pairwise(accumulate((shape[0] for shape in shapes), initial=0)))
        self.filled: dict[str, tuple[Tensor, NDArray[np.float32]]] = {}
        self.state = self._counted()
        self.best = self.value, self.state, dict(self.counts)
        self.runs = 1

    def _is_plain(self, places: list[int]) -> bool:
        if len(places) != 1:
            return False
        op = self.circuit.contractions[places[0]]
        return op.rows == 1 and op.groups == 1 and op.is_whole and not op.transposed

    @property
    def figures(self) -> Figures:
        return self.state.figures

    @property
    def value(self) -> float:
        return self.aim.value(self.state.figures)

    def aim_at(self, aim: Aim) -> None:
        """Another aim, from here on."""
        self.aim = aim
        self.best = self.value, self.state, dict(self.counts)

    # -- counting -------------------------------------------------------------------------------------------
    def _counted(self) -> _State:
        edges = {**self.fixed, **self.counts}
        found = self.circuit.run(edges)
        # In float32 branches of few paths have no slopes left.
        marks = self.circuit.marks(edges) if self.circuit.dtype == torch.float32 else found
        used, alive = self._alive(marks)
        for name in self.uses.keys() - self.plain.keys():
            marked = (self._gain(marks, name) > 0) & (self.counts[name] > 0)
            used[name], alive[name] = int(count_nodes(self.circuit.kernels[name], marked)), int(marked.sum())
        figures = Figures(found.log_total, sum(used.values()), sum(alive.values()))
        missing = {name: self.most[name] - used[name] for name in self.counts}
        return _State(found, figures, missing, {n: self.weights[n] - alive[n] for n in self.counts})

    def _alive(self, marks: Pass) -> tuple[dict[str, int], dict[str, int]]:
        """Effective nodes and kernels of plain layers: (slope > 0) of (count > 0) of (x > 0)."""
        if not self.plain:
            return {}, {}
        reached = torch.cat([marks.x[place] for place in self.plain.values()]).gt(0).float().numpy()
        passed = torch.cat([marks.slope[place] for place in self.plain.values()]).gt(0).numpy()
        kernels = np.empty(len(passed), dtype=np.float32)  # of every output channel
        for name, (start, end), (first, last) in zip(self.plain, self.inputs, self.outputs, strict=True):
            count = self.counts[name]
            if name not in self.filled or self.filled[name][0] is not count:
                self.filled[name] = count, (count.numpy() > 0).astype(np.float32)
            np.dot(self.filled[name][1], reached[start:end], out=kernels[first:last])
        kernels *= passed
        starts = [first for first, _ in self.outputs]
        nodes = np.add.reduceat(kernels > 0, starts, dtype=np.int64).tolist()
        alive = np.add.reduceat(kernels, starts, dtype=np.int64).tolist()
        return dict(zip(self.plain, nodes, strict=True)), dict(zip(self.plain, alive, strict=True))

    def _gain(self, found: Pass, name: str) -> Tensor:
        """G: d ln R / d count."""
        gain = torch.zeros_like(self.counts[name])
        for place in self.uses[name]:
            op = self.circuit.contractions[place]
            op.spread(found.slope[place].to(gain.dtype), found.x[place].to(gain.dtype), gain, add=True)
        return gain

    # -- searching ------------------------------------------------------------------------------------------
    def climb(self, heat: float = 0.0) -> bool:
        """One move: a layer, or two neighbours, rewritten; kept if it is no worse. Whether it is better.

        With ``heat`` a move that loses x is kept with probability exp(-x / heat).
        """
        names = self._window()
        plan = _Plan.drawn(self.random, self._claim())
        before, value = self.state, self.value
        old = {name: self.counts[name] for name in names}
        reached = {name: self._ends(name)[0] > 0 for name in names[1:]}
        for name in names:
            fresh = (self._ends(name)[0] > 0) & ~reached[name] if name in reached else None
            self.counts[name] = self._rewritten(name, plan, fresh)
            self.runs += 1
            if name is names[-1]:
                self.state = self._counted()
            else:  # on the way only what the next layer meets is asked for
                self.state = replace(before, found=self.circuit.run({**self.fixed, **self.counts}))
        gain = self.value - value
        if gain >= 0 or (heat > 0 and self.random.random() < math.exp(gain / heat)):
            if self.value > self.best[0]:
                self.best = self.value, self.state, dict(self.counts)
            return gain > 0
        self.counts.update(old)
        self.state = before
        return False

    def take(self, counts: Mapping[str, Tensor]) -> None:
        """Goes on from other counts, of as many weights in every layer."""
        self.counts = {name: count.to(self.circuit.dtype) for name, count in counts.items()}
        self.state = self._counted()
        self.runs += 1
        if self.value > self.best[0]:
            self.best = self.value, self.state, dict(self.counts)

    def offer(self, counts: Mapping[str, Tensor]) -> tuple[bool, Figures]:
        """Goes on from other counts if they are better, and near the floors. Whether it does; theirs."""
        before, old, best, value = self.state, self.counts, self.best, self.value
        self.take(counts)
        if self.value > value and self.aim.allows(self.figures):
            return True, self.figures
        figures = self.figures
        self.state, self.counts, self.best = before, old, best
        return False, figures

    def settle(self) -> None:
        """Back to the best choice that was met."""
        _, self.state, self.counts = self.best

    def _is_short(self) -> bool:
        return self.figures.kernels < self.aim.floor.kernels

    def _claim(self) -> float:
        """How much of the search nodes may claim: also where kernels are missing, as those need nodes."""
        share = self.aim.weights[1] / sum(self.aim.weights)
        return max(share, 0.5) if self._is_short() else share

    def _window(self) -> list[str]:
        """A layer, or two neighbours in either order; more often where something is missing that counts."""
        wanted = self.state.spare if self._is_short() else self.state.missing
        missing = np.array([wanted[name] for name in self.order], dtype=np.float64)
        chance = np.full(len(missing), 1 / len(missing))
        if missing.any():
            share = self._claim()
            chance = (1 - share / 2) * chance + share / 2 * missing / missing.sum()
        until = np.cumsum(chance)
        place = int(np.searchsorted(until / until[-1], self.random.random(), side="right"))
        kind = self.random.integers(4)
        if kind < 2:
            return [self.order[place]]
        first = max(0, place - int(self.random.integers(2)))
        return self.order[first : first + 2][:: 1 if kind == 2 else -1]

    def _ends(self, name: str) -> tuple[Floats, Floats]:
        """Paths to every input channel, (groups, in), and on from every output channel, (groups, out)."""
        shape = _shape(self.circuit.kernels[name])
        if name in self.plain:
            place = self.plain[name]
            met = self.state.found.x[place], self.state.found.slope[place]
            return met[0].double().numpy()[None], met[1].double().numpy()[None]
        x = self._over_rows(name, self.state.found.x)
        slope = self._over_rows(name, self.state.found.slope)
        return _channels(x, shape[0], shape[2]), _channels(slope, shape[0], shape[1])

    def _over_rows(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """The sum of ``values`` over the rows of all uses, by channel."""
        uses = [(self.circuit.contractions[place], values[place]) for place in self.uses[name]]
        return torch.cat([op.by_row(value) for op, value in uses]).double().sum(0)

    def _rewritten(self, name: str, plan: _Plan, fresh: Flags | None) -> Tensor:
        """New counts of one layer: what covers the channels of the plan first, then the best gains."""
        kernels = self.circuit.kernels[name]
        gain, count, cap = (
            oriented(tensor.double().numpy(), kernels)
            for tensor in (self._gain(self.state.found, name), self.counts[name], self.caps[name])
        )
        if plan.noise:
            gain = gain * np.exp(plan.noise * self.random.standard_normal(gain.shape))
        alive = (gain > 0) & (count > 0)
        inputs: Flags = np.any(alive, axis=1)
        outputs: Flags = np.any(alive, axis=2)
        x, slope = self._ends(name)
        inputs = plan.wanted(inputs, x > 0, self.random)
        outputs = plan.wanted(outputs, slope > 0, self.random)
        if plan.grows:
            outputs |= self.random.random(outputs.shape) < plan.share
            if fresh is not None:
                inputs |= fresh
        number = round(float(count.sum()))
        # What is on no path yet has no gain; the better end of a kernel decides there.
        hope = (slope / (slope.max() or 1.0) + FAINT)[:, :, None] * (x / (x.max() or 1.0) + FAINT)[:, None, :]
        hope *= FAINT
        hope += gain
        covered = cover(inputs, outputs, hope, cap, number, self.random)
        new = _filled(covered, gain, cap, number, self.aim, self.figures, spread=plan.spread)
        result = torch.empty_like(self.counts[name])
        oriented(result.numpy(), kernels)[...] = new
        return result


@dataclass(frozen=True)
class _Plan:
    """Which channels a move covers. ``keep``: the share of those in use; ``reach``: of those that could be
    in use; ``share``: of all others. ``spread``: the weights left over open kernels.
    """

    keep: float
    reach: float
    share: float
    noise: float
    spread: bool

    @classmethod
    def drawn(cls, random: np.random.Generator, claim: float) -> _Plan:
        # Half of the moves that nodes have a claim to try to gain some.
        for_nodes = random.random() < claim / 2
        kind = random.integers(2, 4) if for_nodes else random.integers(4)
        noise = float(random.choice([0.0, 0.0, 0.3, 1.0]))
        keep, reach, share = 1.0, 0.0, 0.0
        if kind == 1:
            keep = float(random.choice([0.0, 0.5, 0.8, 0.95]))
        elif kind == 2:
            reach = float(random.choice([0.1, 0.5, 1.0]))
        elif kind == 3:
            reach, share = float(random.choice([0.1, 1.0])), float(random.choice([0.02, 0.1, 0.3, 1.0]))
        return cls(keep, reach, share, noise, bool(random.random() < 0.3))

    @property
    def grows(self) -> bool:
        return self.share > 0

    def wanted(self, used: Flags, possible: Flags, random: np.random.Generator) -> Flags:
        chance = random.random(used.shape)
        return np.where(used, chance < self.keep, possible & (chance < self.reach))


def _shape(kernels: KernelSet) -> tuple[int, int, int]:
    """(groups, outputs of a group, inputs of a group)."""
    first, second = kernels.shape[0] // kernels.groups, kernels.shape[1]
    return (kernels.groups, second, first) if kernels.transposed else (kernels.groups, first, second)


def oriented(matrix: NDArray[np.generic], kernels: KernelSet) -> Floats:
    """A view (groups, outputs, inputs) of a matrix shaped as the parameter's first two dimensions."""
    apart = matrix.reshape(kernels.groups, -1, matrix.shape[1])
    return apart.transpose(0, 2, 1) if kernels.transposed else apart  # type: ignore[return-value]


def _channels(values: Tensor, groups: int, size: int) -> Floats:
    found: Floats = values.reshape(groups, size).numpy()
    return found


def cover(
    inputs: Flags, outputs: Flags, gain: Floats, cap: Floats, number: int, random: np.random.Generator
) -> Flags:
    """Kernels, one weight each, that together touch the channels marked, the best with the best.

    A pair of channels covered by one kernel frees a weight for the best kernel; as G is a product of a number
    per input and one per output, pairs in the order of those numbers are worth most. What is left over goes
    to the best partner.
    """
    chosen = np.zeros(gain.shape, dtype=bool)
    for group in np.flatnonzero(inputs.any(1) | outputs.any(1)):
        worth = np.where(cap[group] > 0, gain[group], 0.0)
        rows = np.flatnonzero(outputs[group])
        columns = np.flatnonzero(inputs[group])
        rows = rows[np.argsort(-worth[rows].max(1), kind="stable")]
        columns = columns[np.argsort(-worth[:, columns].max(0), kind="stable")]
        pairs = min(len(rows), len(columns))
        edges = list(zip(rows[:pairs], columns[:pairs], strict=True))
        edges += [(row, worth[row].argmax()) for row in rows[pairs:]]
        edges += [(worth[:, column].argmax(), column) for column in columns[pairs:]]
        if edges:
            at = np.array(edges)
            chosen[group, at[:, 0], at[:, 1]] = True
    chosen &= cap > 0
    excess = int(chosen.sum()) - number
    if excess > 0:
        places = np.flatnonzero(chosen)
        chosen.flat[random.choice(places, excess, replace=False)] = False
    return chosen


def _filled(
    covered: Flags,
    gain: Floats,
    cap: Floats,
    number: int,
    aim: Aim,
    figures: Figures,
    *,
    spread: bool = False,
) -> Floats:
    """``number`` weights: one on every covered kernel, the rest by marginal gain.

    The first weight of a kernel is worth a kernel besides its paths, the others paths alone: gains fall along
    a kernel, so that taking the best of all is optimal for what is covered. With ``spread`` a new kernel is
    worth more than any path.
    """
    for_paths, _, for_kernels = aim.weights
    is_short = figures.kernels < aim.floor.kernels
    counts = covered.astype(np.float64)
    left = number - int(np.count_nonzero(covered))
    if left <= 0:
        return counts
    first, other = worth = np.empty((2, gain.size))
    opening = (for_kernels + GUARD[2] * (is_short or spread)) / max(figures.kernels, 1)
    np.multiply(gain.ravel(), for_paths + 1e-6, out=other)
    np.multiply(gain.ravel() > 0, opening, out=first)
    first += other
    first[(covered | (cap < 1)).ravel()] = -1.0
    other[(cap < 2).ravel()] = -1.0
    candidates = _best(worth.ravel(), left)
    sizes = np.where(candidates < gain.size, 1.0, cap.ravel()[candidates % gain.size] - 1)
    before = np.cumsum(sizes) - sizes
    added = np.clip(left - before, 0, sizes)
    np.add.at(counts.ravel(), candidates % gain.size, added)
    return counts


def _best(values: Floats, number: int) -> NDArray[np.intp]:
    """Where the ``number`` largest are, in falling order, ties by index; none below zero."""
    positive = values[values > 0]
    if len(positive) > number:  # a partition with many equal values is slow: zeros stay out of it
        found = np.flatnonzero(values >= np.partition(positive, -number)[-number])
    else:
        zeros = np.flatnonzero(values == 0)[: number - len(positive)]
        found = np.concatenate([np.flatnonzero(values > 0), zeros])
    return found[np.argsort(-values[found], kind="stable")[:number]]
