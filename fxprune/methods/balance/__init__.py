"""Balance: optimise masks for paths, nodes and kernels by DPaI's ascent, and a local search after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph, KernelSet
from fxprune.methods.balance.coordinate_ascent import CoordinateAscent
from fxprune.methods.balance.local_search import LocalSearch
from fxprune.methods.balance.tap_placement import connect_kernels, count_per_kernel, place_at_random
from fxprune.methods.balance.tap_refinement import TapRefinement
from fxprune.methods.balance.target import UNBOUNDED, Target
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Figures, Objective
from fxprune.methods.dpai.weight_gradients import WeightGradients
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.compile import circuit
from fxprune.scoring.contract import Method, Problem, fixed_magnitudes
from fxprune.scoring.layerwise import is_untouched, layer_budgets, select_by_layer
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks

LR = 0.005
"""Adam's learning rate in DPaI."""
ASCENT_SHARE = 6
"""One in so many steps is a step of the ascent, which are longer by the same factor."""
SEARCH_SHARE = 10
"""Where paths matter most, one in so many steps goes to the local search; the rest are random restarts."""
RESTART_COST = 50
"""Steps that a restart counts for, as it takes about that long."""
FUTILE_RESTARTS = 10
"""After so many restarts, none of which reached the floors of nodes and kernels, no more are made."""
STALL_RUNS, LEAST_GAIN = 200, 1e-5
"""The local search ends after so many runs at temperature zero with a smaller gain."""
HOT_SHARE = 0.7
"""Fraction of the local search in which the temperature falls to zero."""
SMALL_WEIGHT = 1e-3
"""Added to the weight of each figure, so that those without a weight grow where that costs nothing."""
EVERY = 50
"""Steps between two entries of the history."""


def balance(
    *,
    alpha: float = 0.99,
    beta: float = 0.5,
    steps: int = 3000,
    taps: Literal["auto", "random", "paths"] = "auto",
) -> Method:
    """Balance nodes, kernels and paths by a local search with exact counts; this library's own method.

    Maximises ``(1 - alpha) ln R_P + alpha [(1 - beta) ln R_N + beta ln R_C]`` (Xiang et al. 2025) over masks
    of a given number of weights per layer: ERK, unless ``budget`` fixes layers. A sixth of the steps is
    DPaI's ascent with steps six times as long. What it finds, and a little more, becomes a floor under all
    three figures. The other steps rewrite one layer, or two neighbours, so that they cover chosen channels,
    and give the other weights to the best gains; paths, nodes and kernels are counted exactly after each, and
    a change is kept if the objective does not fall (early on, if it falls by little). For alpha below 0.5
    most of the steps go to random restarts, by coordinate ascent on ln R_P alone. ``docs/balance.md`` shows
    what that gains. Needs neither data nor weights.

    Options:
        alpha: weight of nodes and kernels, against paths, in [0, 1]
        beta: weight of kernels, against nodes, in [0, 1]
        steps: counts of paths, or what takes as long; the ascent takes one in six
        taps: which weights inside a kernel are kept: "random" ones; those on most "paths", which are the
            central ones, as an image has borders; "auto" is "paths" for alpha below 0.5, else "random"

    The history holds ``step``, ``log_paths``, ``nodes``, ``kernels`` and ``objective`` at channel resolution.
    Under a granularity other than weights, and on networks without a circuit (positions that differ, as after
    a pixel shuffle), the ascent is all there is, with DPaI's own steps.

    Cost: ``steps`` counts of paths, or what takes as long.
    When: as `dpai`, where the objective itself should be as high as can be found.
    """
    for option, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"method 'balance': {option}={value!r}, expected a number in [0, 1]")
    if steps < 1:
        raise ValueError(f"method 'balance': steps={steps!r}, expected an integer of at least 1")
    on_paths = taps == "paths" or (taps == "auto" and alpha < 0.5)
    search = _Balance(Objective(alpha, beta), steps, on_paths)
    return Method(
        name="balance",
        find=search.find,
        needs=frozenset({"graph"}),
        summary="paths, nodes and kernels balanced by an exact search; no data, no weights",
        paper="this library; the objective is that of Xiang et al. 2025, ICLR (DPaI)",
        scored=False,
        shards="shapes",
    )


@dataclass(frozen=True)
class _Balance:
    """The method with its options; ``on_paths``: whether taps go where most paths are."""

    objective: Objective
    steps: int
    on_paths: bool

    @property
    def favours_paths(self) -> bool:
        return self.objective.alpha < 0.5

    def find(self, problem: Problem) -> Masks:
        """Run the ascent and, where the network has a circuit and the masks a path, the local search."""
        if is_untouched(problem):
            return dict(problem.masks)
        layers = layer_budgets(problem)
        compiled = circuit(problem.graph) if problem.granularity == WEIGHT else None
        fixed = {name: (size != 0).cpu() for name, size in fixed_magnitudes(problem).items()}
        steps = self.steps if compiled is None else max(1, self.steps // ASCENT_SHARE)
        with torch.no_grad():
            gradients = self._make_gradients(problem, compiled, fixed)
            ascent = self._run_ascent(problem, gradients, layers, steps)
            masks, start = ascent.masks(), ascent.figures()
        self._note(problem, steps, start)
        if compiled is not None and isinstance(gradients, KernelGradients) and start.log_paths > -math.inf:
            fixed_counts = {n: gradients.counts[n] for n in compiled.kernels if n not in masks}
            search = self._make_search(problem, compiled, masks, fixed_counts, self._target(start, layers))
            self._run_search(problem, search, fixed_counts)
            masks = self._place_taps(problem, search, masks, fixed)
        return _fit_budget(problem, masks, layers)

    # -- ascent ---------------------------------------------------------------------------------------------
    def _make_gradients(
        self, problem: Problem, compiled: Circuit | None, fixed: dict[str, Tensor]
    ) -> KernelGradients | WeightGradients:
        names = list(problem.masks)
        if compiled is None:
            return WeightGradients(problem.graph, names, fixed, self.objective, "channel", problem.device)
        return KernelGradients(compiled, names, fixed, self.objective)

    def _run_ascent(
        self,
        problem: Problem,
        gradients: KernelGradients | WeightGradients,
        layers: dict[str, int],
        steps: int,
    ) -> Ascent:
        magnitudes = {
            name: torch.randn(mask.shape, generator=problem.generator).abs().where(mask.cpu(), -torch.inf)
            for name, mask in problem.masks.items()
        }
        ascent = Ascent(gradients, magnitudes, layers, LR * self.steps / steps)
        for _ in problem.progress(range(steps), "balance: ascent", steps):
            ascent.step()
        return ascent

    def _target(self, start: Figures, layers: dict[str, int]) -> Target:
        """Return the objective with floors a little above ``start``, the figures that the ascent reached."""
        weights = self.objective.weights
        for_paths, _, for_kernels = weights
        # Floor of ln R_P. Where nodes alone count, a longer ascent would go on trading paths for them; where
        # paths have a small weight besides others, it would still add many.
        if weights == (0, 1, 0):
            more = -1.0
        elif self.favours_paths or not for_paths:
            more = 0.7
        else:
            more = 2.5 if for_paths < 0.2 else 1.0
        total = sum(layers.values())
        kernels = min(start.kernels + start.kernels // 50 + 1, total)
        if for_kernels and not for_paths:
            kernels = total  # without a weight of paths, every weight can have a kernel to itself
        nodes = start.nodes if self.favours_paths else start.nodes + start.nodes // 10 + 1
        floor = Figures(start.log_paths + more, nodes, kernels)
        # For alpha >= 0.5, never fall below the node and kernel counts that the ascent reached.
        least = UNBOUNDED
        if not self.favours_paths:
            least = Figures(UNBOUNDED.log_paths, start.nodes, start.kernels)
        path_weight, node_weight, kernel_weight = (weight + SMALL_WEIGHT for weight in weights)
        return Target((path_weight, node_weight, kernel_weight), floor, least)

    # -- local search ---------------------------------------------------------------------------------------
    def _make_search(
        self,
        problem: Problem,
        compiled: Circuit,
        masks: Masks,
        fixed_counts: dict[str, Tensor],
        target: Target,
    ) -> LocalSearch:
        usable = _usable_weights(problem)
        caps = {name: count_per_kernel(mask) for name, mask in usable.items()}
        counts = {name: count_per_kernel(mask & usable[name]) for name, mask in masks.items()}
        search = LocalSearch(compiled, counts, caps, fixed_counts, target, problem.generator)
        search.runs = self.steps // ASCENT_SHARE
        return search

    def _run_search(self, problem: Problem, search: LocalSearch, fixed_counts: dict[str, Tensor]) -> None:
        """Move to the best counts that restarts (where paths matter most) and moves find."""
        temperature = 2e-3 + 1e-1 * self.objective.weights[0]
        if self.favours_paths:
            ascent = CoordinateAscent(search.circuit, search.counts, search.caps, fixed_counts, search.random)
            richest = self._restart(problem, search, ascent)
            if richest is not None:  # too few nodes or kernels: raise them to the floors first
                temperature = 0.0
                search.set_target(_raise_node_floor(search.target))
                search.restart_from(richest)
                self._climb(problem, search, (search.runs + self.steps) // 2, temperature)
                search.restore_best()
                search.set_target(_lock_reached_counts(search.target, search.figures))
        self._climb(problem, search, self.steps, temperature)
        search.restore_best()

    def _restart(
        self, problem: Problem, search: LocalSearch, ascent: CoordinateAscent
    ) -> dict[str, Tensor] | None:
        """Restart the search from counts of more paths: the first half of them anywhere, then near the best.

        If no restart is near the floors of nodes and kernels, as on large networks, the counts of most paths
        are returned: moves can raise them to the floors.
        """
        number = max(1, (self.steps - search.runs - self.steps // SEARCH_SHARE) // RESTART_COST)
        most_paths, richest, accepted, before = -math.inf, None, 0, search.runs
        for turn in problem.progress(range(number), "balance: sweeps", number):
            if turn == FUTILE_RESTARTS and not accepted:
                number = FUTILE_RESTARTS
                break
            counts = ascent.draw(search.counts if 2 * turn > number else None)
            is_accepted, figures = search.restart_if_better(counts)
            accepted += is_accepted
            if figures.log_paths > most_paths:
                most_paths, richest = figures.log_paths, counts
        search.runs = before + RESTART_COST * number
        return None if accepted else richest

    def _climb(self, problem: Problem, search: LocalSearch, until: int, temperature: float) -> None:
        """Make moves up to so many runs in all, or until they stall, while the temperature falls to zero."""
        start = noted = improved = search.runs
        length, best = until - start, search.value
        for _ in problem.progress(range(length), "balance: exchange", length):
            cooled = (search.runs - start) / (HOT_SHARE * length)
            has_stalled = search.runs > improved + STALL_RUNS and (cooled > 1 or not temperature)
            if search.runs > until or has_stalled:
                break
            search.try_move(temperature * max(0.0, 1 - cooled))
            if search.value > best + LEAST_GAIN:
                improved, best = search.runs, search.value
            if search.runs >= noted + EVERY:
                noted = search.runs
                self._note(problem, noted, search.figures)

    # -- taps -----------------------------------------------------------------------------------------------
    def _place_taps(
        self, problem: Problem, search: LocalSearch, masks: Masks, fixed: dict[str, Tensor]
    ) -> Masks:
        """Return masks with the counts that the search found, or better ones where taps go to paths."""
        usable, counts = _usable_weights(problem), search.counts
        masks = {name: place_at_random(counts[name], usable[name], problem.generator) for name in masks}
        masks = connect_kernels(problem.graph, masks, counts, usable, fixed)
        if self.on_paths:
            masks = TapRefinement(problem.graph, usable, fixed, search.target, search.random).refine(masks)
            search.restart_from({name: count_per_kernel(mask) for name, mask in masks.items()})
        self._note(problem, self.steps, search.figures)
        return masks

    def _note(self, problem: Problem, step: int, figures: Figures) -> None:
        """Append an entry to the history."""
        row = {"step": step, **figures._asdict(), "objective": self.objective.value(figures)}
        for name, value in row.items():
            problem.history.setdefault(name, []).append(value)


def _raise_node_floor(target: Target) -> Target:
    """Raise the floor of nodes by a tenth: on large networks a longer ascent would have found more."""
    return replace(target, floor=target.floor._replace(nodes=target.floor.nodes + target.floor.nodes // 10))


def _lock_reached_counts(target: Target, figures: Figures) -> Target:
    """Never fall below the nodes and kernels of ``figures``, as far as they are at or below the floors."""
    nodes, kernels = min(target.floor.nodes, figures.nodes), min(target.floor.kernels, figures.kernels)
    return replace(target, least=Figures(UNBOUNDED.log_paths, nodes, kernels))


def _usable_weights(problem: Problem) -> Masks:
    """Return which weights may be kept: not pruned before, and not on taps that only ever see padding."""
    return {name: mask.cpu() & _live_taps(problem.graph, name) for name, mask in problem.masks.items()}


def _live_taps(graph: ChannelGraph, name: str) -> Tensor:
    kernels: KernelSet = graph.kernels[name]
    return kernels.live_taps.expand(kernels.shape)


def _fit_budget(problem: Problem, masks: Masks, layers: dict[str, int]) -> Masks:
    """Return masks that keep exactly what was asked for, under any granularity, and near ``masks``.

    They keep less where the weights of a layer exceed its live taps. Ties are broken at random.
    """
    scores = {
        name: (4.0 * mask + torch.rand(mask.shape, generator=problem.generator)).to(problem.device)
        for name, mask in masks.items()
    }
    return select_by_layer(problem, scores, layers, "balance")
