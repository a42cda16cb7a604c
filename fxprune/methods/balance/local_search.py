"""Improve masks by rewriting one or two layers at a time, every result counted exactly.

The masks are counts of kept weights per kernel, and every layer keeps its number of weights. A move chooses
which channels a layer covers (those in use, so that nothing is lost; fewer, so that paths gather in the rest;
or more), and then the best counts that cover them (:mod:`fxprune.methods.balance.layer_moves`).
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

from fxprune.methods.balance.layer_moves import (
    Flags,
    Floats,
    MovePlan,
    cover_channels,
    fill_by_gain,
    group_shape,
    oriented,
)
from fxprune.methods.balance.target import FLOOR_PRICES, Target
from fxprune.methods.dpai.objective import Figures, sum_nodes
from fxprune.paths.circuit.circuit import Circuit, Pass

__all__ = ["LocalSearch"]

FAINT = 1e-9
"""Stand-in for the gain of kernels that no path reaches, and for channels without paths."""


@dataclass
class _Evaluation:
    """Results for the present counts.

    ``missing_nodes``: how many nodes more each layer could have with its weights; ``spare_weights``: how many
    of its weights are not the only one of an effective kernel.
    """

    run: Pass
    figures: Figures
    missing_nodes: dict[str, int]
    spare_weights: dict[str, int]


class LocalSearch:
    """Maximise a target over counts of kept weights per kernel.

    ``counts``: the start, by parameter, in the shape of its first two dimensions. ``caps``: how many weights
    each kernel may have. ``fixed``: counts of parameters that do not change. ``runs`` counts the evaluations.
    """

    def __init__(
        self,
        circuit: Circuit,
        counts: Mapping[str, Tensor],
        caps: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        target: Target,
        generator: torch.Generator,
    ) -> None:
        self.circuit, self.fixed = circuit, dict(fixed)
        self.counts = {name: count.to(circuit.dtype).clone() for name, count in counts.items()}
        self.caps = {name: cap.to(circuit.dtype) for name, cap in caps.items()}
        self.target = target
        seed = int(torch.randint(2**31, (), generator=generator))
        self.random = np.random.default_rng(seed)
        self._uses: dict[str, list[int]] = {name: [] for name in counts}
        for place, op in enumerate(circuit.contractions):
            if op.name in self._uses:
                self._uses[op.name].append(place)
        self._order = [name for name in self._uses if self._uses[name]]
        self._weights = {name: int(count.sum()) for name, count in self.counts.items()}
        self._most_nodes = {
            name: min(number, circuit.kernels[name].out_space.size) for name, number in self._weights.items()
        }
        # Layers with one use and one number per channel are counted together; where their channels are then.
        self._simple = {name: places[0] for name, places in self._uses.items() if self._is_simple(places)}
        shapes = [circuit.kernels[name].shape for name in self._simple]
        self._inputs = list(pairwise(accumulate((shape[1] for shape in shapes), initial=0)))
        self._outputs = list(pairwise(accumulate((shape[0] for shape in shapes), initial=0)))
        self._filled: dict[str, tuple[Tensor, NDArray[np.float32]]] = {}
        self.state = self._evaluate()
        self.best: tuple[float, _Evaluation, dict[str, Tensor]]
        self._mark_best()
        self.runs = 1

    def _is_simple(self, places: list[int]) -> bool:
        if len(places) != 1:
            return False
        op = self.circuit.contractions[places[0]]
        return op.rows == 1 and op.groups == 1 and op.is_whole and not op.transposed

    @property
    def figures(self) -> Figures:
        return self.state.figures

    @property
    def value(self) -> float:
        return self.target.value(self.state.figures)

    def set_target(self, target: Target) -> None:
        """Maximise another target from here on."""
        self.target = target
        self._mark_best()

    def try_move(self, temperature: float = 0.0) -> bool:
        """Rewrite a layer, or two neighbours; keep the result if it is no worse. Return whether it is better.

        With a temperature, a move that loses x is kept with probability exp(-x / temperature).
        """
        names = self._draw_layers()
        plan = MovePlan.draw(self.random, self._node_share())
        state, value = self.state, self.value
        old = {name: self.counts[name] for name in names}
        self._rewrite_layers(names, plan)
        gain = self.value - value
        if gain >= 0 or (temperature > 0 and self.random.random() < math.exp(gain / temperature)):
            if self.value > self.best[0]:
                self._mark_best()
            return gain > 0
        self.counts.update(old)
        self.state = state
        return False

    def restart_from(self, counts: Mapping[str, Tensor]) -> None:
        """Go on from other counts, of as many weights in every layer."""
        self.counts = {name: count.to(self.circuit.dtype) for name, count in counts.items()}
        self.state = self._evaluate()
        self.runs += 1
        if self.value > self.best[0]:
            self._mark_best()

    def restart_if_better(self, counts: Mapping[str, Tensor]) -> tuple[bool, Figures]:
        """Go on from other counts if they are better and near the floors; return whether, and the figures."""
        state, old, best, value = self.state, self.counts, self.best, self.value
        self.restart_from(counts)
        if self.value > value and self.target.is_near_floor(self.figures):
            return True, self.figures
        figures = self.figures
        self.state, self.counts, self.best = state, old, best
        return False, figures

    def restore_best(self) -> None:
        """Go back to the best counts since the target was set."""
        _, self.state, self.counts = self.best

    def _mark_best(self) -> None:
        self.best = self.value, self.state, dict(self.counts)

    # -- evaluation -----------------------------------------------------------------------------------------
    def _evaluate(self) -> _Evaluation:
        """Count paths, nodes and kernels."""
        counts = {**self.fixed, **self.counts}
        run = self.circuit.run(counts)
        # In float32, branches with far fewer paths than others may have no slopes left.
        on_paths = self.circuit.on_paths(counts) if self.circuit.dtype == torch.float32 else run
        nodes, kernels = self._count_simple(on_paths)
        for name in self._uses.keys() - self._simple.keys():
            effective = (self._gain(on_paths, name) > 0) & (self.counts[name] > 0)
            nodes[name] = int(sum_nodes(self.circuit.kernels[name], effective))
            kernels[name] = int(effective.sum())
        return _Evaluation(
            run,
            Figures(run.log_total, sum(nodes.values()), sum(kernels.values())),
            missing_nodes={name: self._most_nodes[name] - nodes[name] for name in self.counts},
            spare_weights={name: self._weights[name] - kernels[name] for name in self.counts},
        )

    def _count_simple(self, on_paths: Pass) -> tuple[dict[str, int], dict[str, int]]:
        """Count effective nodes and kernels of the simple layers.

        The kernel (o, i) is effective if slope[o] > 0, count[o, i] > 0 and x[i] > 0; so the effective kernels
        into every output are [slope > 0] * ([count > 0] @ [x > 0]).
        """
        if not self._simple:
            return {}, {}
        is_reached = torch.cat([on_paths.x[place] for place in self._simple.values()]).gt(0).float().numpy()
        is_passed = torch.cat([on_paths.slope[place] for place in self._simple.values()]).gt(0).numpy()
        into_output = np.empty(len(is_passed), dtype=np.float32)
        for name, (start, end), (first, last) in zip(self._simple, self._inputs, self._outputs, strict=True):
            count = self.counts[name]
            if name not in self._filled or self._filled[name][0] is not count:
                self._filled[name] = count, (count.numpy() > 0).astype(np.float32)
            np.dot(self._filled[name][1], is_reached[start:end], out=into_output[first:last])
        into_output *= is_passed
        starts = [first for first, _ in self._outputs]
        nodes = np.add.reduceat(into_output > 0, starts, dtype=np.int64).tolist()
        kernels = np.add.reduceat(into_output, starts, dtype=np.int64).tolist()
        return dict(zip(self._simple, nodes, strict=True)), dict(zip(self._simple, kernels, strict=True))

    def _gain(self, run: Pass, name: str) -> Tensor:
        """Return G = d ln R / d count."""
        gain = torch.zeros_like(self.counts[name])
        for place in self._uses[name]:
            op = self.circuit.contractions[place]
            op.spread(run.slope[place].to(gain.dtype), run.x[place].to(gain.dtype), gain, add=True)
        return gain

    # -- moves ----------------------------------------------------------------------------------------------
    def _lacks_kernels(self) -> bool:
        return self.figures.kernels < self.target.floor.kernels

    def _node_share(self) -> float:
        """Return the weight of nodes in the target, as a share; at least 1/2 where kernels are short.

        Kernels need nodes to be effective.
        """
        share = self.target.weights[1] / sum(self.target.weights)
        return max(share, 0.5) if self._lacks_kernels() else share

    def _draw_layers(self) -> list[str]:
        """Draw a layer, or two neighbours in either order; more often where nodes or kernels are missing."""
        wanted = self.state.spare_weights if self._lacks_kernels() else self.state.missing_nodes
        missing = np.array([wanted[name] for name in self._order], dtype=np.float64)
        chance = np.full(len(missing), 1 / len(missing))
        if missing.any():
            share = self._node_share()
            chance = (1 - share / 2) * chance + share / 2 * missing / missing.sum()
        cumulative = np.cumsum(chance)
        place = int(np.searchsorted(cumulative / cumulative[-1], self.random.random(), side="right"))
        kind = self.random.integers(4)
        if kind < 2:
            return [self._order[place]]
        first = max(0, place - int(self.random.integers(2)))
        return self._order[first : first + 2][:: 1 if kind == 2 else -1]

    def _rewrite_layers(self, names: list[str], plan: MovePlan) -> None:
        """Rewrite layers one after the other, each with the path counts that the one before leaves."""
        before = self.state
        was_reached = {name: self._path_counts(name)[0] > 0 for name in names[1:]}
        for name in names:
            newly_reached = (
                (self._path_counts(name)[0] > 0) & ~was_reached[name] if name in was_reached else None
            )
            self.counts[name] = self._rewrite_layer(name, plan, newly_reached)
            self.runs += 1
            if name is names[-1]:
                self.state = self._evaluate()
            else:  # the next layer needs path counts only
                self.state = replace(before, run=self.circuit.run({**self.fixed, **self.counts}))

    def _rewrite_layer(self, name: str, plan: MovePlan, newly_reached: Flags | None) -> Tensor:
        """Return new counts of a layer: cover the channels of the plan, give the others to the best gains."""
        kernels = self.circuit.kernels[name]
        gain, count, caps = (
            oriented(tensor.double().numpy(), kernels)
            for tensor in (self._gain(self.state.run, name), self.counts[name], self.caps[name])
        )
        if plan.noise:
            gain = gain * np.exp(plan.noise * self.random.standard_normal(gain.shape))
        effective = (gain > 0) & (count > 0)
        x, slope = self._path_counts(name)
        inputs = plan.draw_channels(np.any(effective, axis=1), x > 0, self.random)
        outputs = plan.draw_channels(np.any(effective, axis=2), slope > 0, self.random)
        if plan.wakes:
            outputs |= self.random.random(outputs.shape) < plan.wake
            if newly_reached is not None:
                inputs |= newly_reached
        number = round(float(count.sum()))
        covered = cover_channels(inputs, outputs, _gain_or_hope(gain, x, slope), caps, number, self.random)
        new = fill_by_gain(
            covered,
            gain,
            caps,
            number,
            path_weight=self.target.weights[0],
            kernel_bonus=self._kernel_bonus(plan),
        )
        result = torch.empty_like(self.counts[name])
        oriented(result.numpy(), kernels)[...] = new
        return result

    def _kernel_bonus(self, plan: MovePlan) -> float:
        """Return d target / d R_C, with the price of the floor where kernels are short or to be spread."""
        at_floor_price = self._lacks_kernels() or plan.spread
        return (self.target.weights[2] + FLOOR_PRICES[2] * at_floor_price) / max(self.figures.kernels, 1)

    def _path_counts(self, name: str) -> tuple[Floats, Floats]:
        """Return the paths into every input (groups, inputs), and d ln R / d output (groups, outputs)."""
        if name in self._simple:
            place = self._simple[name]
            x, slope = self.state.run.x[place], self.state.run.slope[place]
            return x.double().numpy()[None], slope.double().numpy()[None]
        groups, outputs, inputs = group_shape(self.circuit.kernels[name])
        x, slope = (self._sum_uses(name, values) for values in (self.state.run.x, self.state.run.slope))
        return x.reshape(groups, inputs).numpy(), slope.reshape(groups, outputs).numpy()

    def _sum_uses(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Sum ``values`` by channel, over all positions of all uses of a layer."""
        uses = [(self.circuit.contractions[place], values[place]) for place in self._uses[name]]
        return torch.cat([op.by_row(value) for op, value in uses]).double().sum(0)


def _gain_or_hope(gain: Floats, x: Floats, slope: Floats) -> Floats:
    """Return the gain, plus a faint worth of kernels that no path reaches.

    Their gain x * slope is zero, as one end has no paths; by the faint worth the better other end decides.
    """
    x_share, slope_share = x / (x.max() or 1.0), slope / (slope.max() or 1.0)
    hope: Floats = (slope_share + FAINT)[:, :, None] * (x_share + FAINT)[:, None, :]
    hope *= FAINT
    hope += gain
    return hope
