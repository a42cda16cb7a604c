"""Prune by synaptic flow in many small rounds: the loop that SynFlow and its variants share.

Weights that compete one by one are removed in place (:func:`_by_removal`): no round writes a score or a mask
for each of them. At channel resolution the network is a circuit, whose counts are kept from round to round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow
from fxprune.scoring.contract import (
    Problem,
    Scores,
    fixed_magnitudes,
    prune_in_rounds,
    round_budgets,
    select_within,
)
from fxprune.scoring.distributed import agree
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.incremental import Dense, Gain, Outer, Survivors
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential
from fxprune.sparsity.select import check_scores

__all__ = ["Synapse", "in_rounds"]

LARGEST = 1e36
"""Where derivatives are cut off, as in ``flow``."""


def _same(x: Tensor) -> Tensor:
    return x


def _plain(gradient: Tensor, log_total: float) -> Tensor:
    return gradient


@dataclass(frozen=True)
class Synapse:
    """A variant: a weight's score is ``strength(|w|) * gain(d ln R / d edge, ln R)``.

    R is that of ``edge(strength(|w|))`` for the weights that are left, zero for the others.
    """

    strength: Callable[[Tensor], Tensor] = _same
    edge: Callable[[Tensor], Tensor] = _same
    gain: Callable[[Tensor, float], Tensor] = _plain


def in_rounds(
    synapse: Synapse, *, rounds: int, resolution: Literal["spatial", "channel"], name: str
) -> Callable[[Problem], Masks]:
    """A method's ``find``: ``rounds`` rounds under an exponential schedule, or under the problem's own.

    R is the sum of the outputs for an all-ones input with the edges of ``synapse``, without biases, norms and
    activations; average pooling averages, products take the geometric mean, so that neither factor starves.
    ln R and d ln R / d edge are finite for any network.
    """
    schedule = Exponential(rounds)

    def find(problem: Problem) -> Masks:
        strengths = {
            label: synapse.strength(weight.abs().float().contiguous())
            for label, weight in problem.weights.items()
        }
        others = {
            label: synapse.edge(synapse.strength(size)) for label, size in fixed_magnitudes(problem).items()
        }
        traversed = _TraversedNetwork(problem.graph, synapse, others, resolution)
        if problem.granularity == WEIGHT and problem.shards is None and not problem.invert:
            return _by_removal(problem, traversed, strengths, schedule, name)

        def criterion(_: Problem, masks: Masks) -> Scores:
            alive = {label: strength * masks[label] for label, strength in strengths.items()}
            gains = traversed.flow(alive)
            return {label: strength * gains[label] for label, strength in alive.items()}

        return prune_in_rounds(problem, criterion, schedule=schedule, regrow=False, name=name)

    return find


def _by_removal(
    problem: Problem,
    traversed: _TraversedNetwork,
    strengths: dict[str, Tensor],
    schedule: Exponential,
    name: str,
) -> Masks:
    """Remove weights in place, where they compete one by one."""
    check_scores(strengths, problem.budget, name)
    compiled = None
    if traversed.resolution == "channel":
        compiled = circuit(problem.graph, pool="mean", products="mean")
    network = traversed if compiled is None else _CircuitNetwork(compiled, traversed, strengths)
    weights = Survivors(strengths, problem.masks)
    network.start(weights)
    for budget in round_budgets(problem, schedule=schedule, regrow=False, name=name):
        gains = network.gains(weights)
        if weights.is_large(budget):
            masks = select_within(problem, weights.scores(gains), budget, weights.masks(), name)
            pruned = weights.restrict(masks)
        else:
            pruned = weights.reduce(gains, budget)
        network.prune(weights, pruned)
    masks = weights.masks()
    if problem.group is not None:
        agree(masks, problem.group)
    return masks


@dataclass
class _TraversedNetwork:
    """A network that is traversed in every round. ``others``: edges of parameters that are not pruned."""

    graph: ChannelGraph
    synapse: Synapse
    others: dict[str, Tensor]
    resolution: Literal["spatial", "channel"]

    def flow(self, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gain of every weight; ``alive`` are the strengths of the kept ones, and zeros."""
        edges = {label: self.synapse.edge(strength) for label, strength in alive.items()}
        found = flow(
            self.graph, edges | self.others, resolution=self.resolution, pool="mean", products="mean"
        )
        return {label: self.synapse.gain(found.gradients[label], found.log_total) for label in alive}

    def start(self, weights: Survivors) -> None:
        """Nothing is kept between rounds."""

    def gains(self, weights: Survivors) -> dict[str, Gain]:
        """The factor of every weight's score besides its strength."""
        found = self.flow({label: strength.nan_to_num(0.0) for label, strength in weights.values.items()})
        return {label: Dense(gain.reshape(*gain.shape[:2], -1)) for label, gain in found.items()}

    def prune(self, weights: Survivors, pruned: dict[str, Tensor]) -> None:
        """Nothing is kept between rounds."""


class _CircuitNetwork:
    """The same network as a circuit. The sum of every kernel's edges is kept from round to round.

    ``strengths``: those of taps that see nothing but padding are set to zero, in place, so that all taps of a
    kernel may share its gain.
    """

    def __init__(
        self, compiled: Circuit, traversed: _TraversedNetwork, strengths: Mapping[str, Tensor]
    ) -> None:
        self.circuit, self.traversed, self.synapse = compiled, traversed, traversed.synapse
        self.kernels = traversed.graph.kernels
        for label, strength in strengths.items():
            if self.kernels[label].shape[2:]:
                strength.mul_(self.kernels[label].live_taps.to(strength.device))
        self.counts: dict[str, Tensor] = {}

    def start(self, weights: Survivors) -> None:
        """Sum the edges of all kernels."""
        for label, edges in self.traversed.others.items():
            live = self.kernels[label].live_taps.to(edges) if edges.shape[2:] else 1
            self.counts[label] = self._summed(edges * live)
        for label, strength in weights.values.items():
            self.counts[label] = self._summed(self.synapse.edge(strength))

    def prune(self, weights: Survivors, pruned: dict[str, Tensor]) -> None:
        """Sum the kernels that lost weights again."""
        for label, index in pruned.items():
            strength, counts = weights.values[label], self.counts[label].view(-1)
            taps = strength.numel() // len(counts)
            if taps == 1:
                counts[index] = 0
                continue
            places = torch.unique_consecutive(index.div(taps, rounding_mode="floor"))
            kernels = strength.view(-1, taps).index_select(0, places)
            counts[places] = self._summed(self.synapse.edge(kernels).unsqueeze(0)).view(-1)

    def gains(self, weights: Survivors) -> dict[str, Gain]:
        """The factor that the scores of a kernel's weights have besides their strengths."""
        found = self.circuit.run(self.counts)
        if any(bool(slope.isnan().any()) for slope in found.slope):  # beyond what single scales can hold
            return self.traversed.gains(weights)
        return {label: self._gain(label, found) for label in weights.values}

    def _summed(self, edges: Tensor) -> Tensor:
        """The sum of every kernel's edges, pruned ones (NaN) being zero; a new tensor."""
        alive = edges.nan_to_num(0.0)
        dtype = self.circuit.dtype
        return alive.flatten(2).sum(-1, dtype=dtype) if alive.dim() > 2 else alive.to(dtype)

    def _gain(self, label: str, found: Pass) -> Gain:
        def then(gradient: Tensor) -> Tensor:
            return self.synapse.gain(gradient, found.log_total)

        uses = [(op, place) for place, op in enumerate(self.circuit.contractions) if op.name == label]
        pairs = [_balanced(op.by_row(found.slope[place]), op.by_row(found.x[place])) for op, place in uses]
        if len(uses) == 1 and uses[0][0].is_whole and uses[0][0].groups == 1:
            (slope, x), transposed = pairs[0], uses[0][0].transposed
            return Outer(x, slope, then) if transposed else Outer(slope, x, then)
        gradient = torch.zeros(self.counts[label].shape, device=self.counts[label].device)
        for (op, _), (slope, x) in zip(uses, pairs, strict=True):
            op.spread(slope, x, gradient, add=True)
        return Dense(then(gradient).unsqueeze(-1))


def _balanced(slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the largest ``x`` being one; cut off, so that sums of their products are finite."""
    top = x.amax().double()
    top = torch.where(top > 0, top, torch.ones_like(top))
    limit = LARGEST / len(slope)
    return (slope.double() * top).clamp(max=limit).float(), (x.double() / top).float()
