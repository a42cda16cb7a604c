"""Balance: many paths, nodes and kernels at once, by DPaI's ascent and an exact search after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph, KernelSet
from fxprune.methods.balance.coordinate_ascent import Sweeps
from fxprune.methods.balance.layer_moves import Exchange
from fxprune.methods.balance.tap_placement import Polish, counted, placed, settled_inside
from fxprune.methods.balance.target import NOTHING, Aim
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelReading
from fxprune.methods.dpai.objective import Figures, Mixture, WeightReading
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.compile import circuit
from fxprune.scoring.contract import Method, Problem
from fxprune.scoring.layerwise import is_untouched, layer_budgets, others, settled
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks

LR = 0.005
"""How far a score goes in a step of DPaI."""
SHARE = 6
"""One count in so many goes to the ascent, whose steps are as many times longer."""
LAST = 10
"""Where paths matter most, one in so many goes to the exchange; the others to beginnings anew."""
DRAW = 50
"""Counts that such a beginning takes the time of, about."""
TRIED = 10
"""Beginnings that are all below the floors of nodes and kernels, after which no other is made."""
STALLED, LITTLE = 200, 1e-5
"""Counts without heat in which the exchange has to gain so much, or it ends."""
SLACK = 1e-3
"""Weight of a figure that the objective leaves out, so that it grows where that costs nothing."""
EVERY = 50
"""Counts between two entries of the history."""


def balance(
    *,
    alpha: float = 0.99,
    beta: float = 0.5,
    steps: int = 3000,
    taps: Literal["auto", "random", "paths"] = "auto",
) -> Method:
    """Node, kernel and path balancing by exact exchange; this library's own, for the objective of DPaI.

    Maximises ``(1 - alpha) ln R_P + alpha [(1 - beta) ln R_N + beta ln R_C]`` (Xiang et al. 2025) over masks
    of a given number of weights per layer: ERK, unless ``budget`` fixes layers. A sixth of the steps is
    DPaI's ascent with steps six times as long. What it finds, and a little more, becomes a floor under all
    three figures. The other steps rewrite one layer, or two neighbours, so that they cover chosen channels
    and give the rest to the best gains; paths, nodes and kernels are counted exactly after each, and a change
    is kept if the objective does not fall (early on, if it falls by little). For alpha below 0.5 most of them
    go to beginnings anew, by coordinate ascent on ln R_P alone. ``docs/balance.md`` shows what that gains.
    Needs neither data nor weights.

    Options:
        alpha: weight of nodes and kernels, against paths, in [0, 1]
        beta: weight of kernels, against nodes, in [0, 1]
        steps: counts of paths, or what takes as long; the ascent takes one in six
        taps: which weights inside a kernel: "random" ones; those on most "paths", which are the central ones,
            as an image has borders; "auto" is "paths" for alpha below 0.5, where paths matter most

    The history holds ``step``, ``log_paths``, ``nodes``, ``kernels`` and ``objective`` at channel resolution.
    Under a granularity other than weights, and on networks without a circuit (positions that differ, as after
    a pixel shuffle), the ascent is all there is, with DPaI's own steps.
    """
    for option, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"method 'balance': {option}={value!r}, expected a number in [0, 1]")
    if steps < 1:
        raise ValueError(f"method 'balance': steps={steps!r}, expected an integer of at least 1")
    on_paths = taps == "paths" or (taps == "auto" and alpha < 0.5)
    search = _Search(Mixture(alpha, beta), steps, on_paths)
    return Method(
        name="balance",
        find=search.find,
        summary="paths, nodes and kernels balanced by an exact search; no data, no weights",
        paper="this library; the objective is that of Xiang et al. 2025, ICLR (DPaI)",
        scored=False,
        shards="shapes",
    )


@dataclass(frozen=True)
class _Search:
    """The options, checked."""

    mixture: Mixture
    steps: int
    on_paths: bool

    @property
    def for_paths(self) -> bool:
        """Whether paths matter most."""
        return self.mixture.alpha < 0.5

    def find(self, problem: Problem) -> Masks:
        if is_untouched(problem):
            return dict(problem.masks)
        layers = layer_budgets(problem)
        found = circuit(problem.graph) if problem.granularity == WEIGHT else None
        fixed = {name: (size != 0).cpu() for name, size in others(problem).items()}
        length = self.steps if found is None else max(1, self.steps // SHARE)
        with torch.no_grad():
            if found is None:
                reading: KernelReading | WeightReading = WeightReading(
                    problem.graph, list(problem.masks), fixed, self.mixture, "channel", problem.device
                )
            else:
                reading = KernelReading(found, list(problem.masks), fixed, self.mixture)
            ascent = self._ascended(problem, reading, layers, length, LR * self.steps / length)
            masks, start = ascent.masks(), ascent.figures()
        self._note(problem, length, start)
        if found is not None and start.log_paths > -math.inf and isinstance(reading, KernelReading):
            unpruned = {name: reading.counts[name] for name in found.kernels if name not in masks}
            masks = self._exchanged(problem, found, masks, fixed, unpruned, self._aim(start, layers))
        return _settled(problem, masks, layers)

    def _ascended(
        self,
        problem: Problem,
        reading: KernelReading | WeightReading,
        layers: dict[str, int],
        length: int,
        lr: float,
    ) -> Ascent:
        magnitudes = {
            name: torch.randn(mask.shape, generator=problem.generator).abs().where(mask.cpu(), -torch.inf)
            for name, mask in problem.masks.items()
        }
        ascent = Ascent(reading, magnitudes, layers, lr)
        for _ in problem.progress(range(length), "balance: ascent", length):
            ascent.step()
        return ascent

    def _exchanged(
        self,
        problem: Problem,
        found: Circuit,
        masks: Masks,
        fixed: dict[str, Tensor],
        unpruned: dict[str, Tensor],
        aim: Aim,
    ) -> Masks:
        """What the search makes of ``masks``. ``unpruned``: the counts of ``fixed``."""
        usable = {name: mask.cpu() & _live(problem.graph, name) for name, mask in problem.masks.items()}
        caps = {name: counted(mask) for name, mask in usable.items()}
        counts = {name: counted(mask & usable[name]) for name, mask in masks.items()}
        exchange = Exchange(found, counts, caps, unpruned, aim, problem.generator)
        exchange.runs, heat = self.steps // SHARE, 2e-3 + 1e-1 * self.mixture.weights[0]
        if self.for_paths:
            sweeps = Sweeps(found, counts, caps, unpruned, exchange.random)
            low = self._draw(problem, exchange, sweeps)
            if low is not None:
                heat = 0.0
                exchange.aim_at(_with_more_nodes(aim))
                exchange.take(low)
                self._climb(problem, exchange, (exchange.runs + self.steps) // 2, heat)
                exchange.settle()
                exchange.aim_at(_without_sale(exchange.aim, exchange.figures))
        self._climb(problem, exchange, self.steps, heat)
        exchange.settle()
        masks = {name: placed(exchange.counts[name], usable[name], problem.generator) for name in masks}
        masks = settled_inside(problem.graph, masks, exchange.counts, usable, fixed)
        if self.on_paths:
            polish = Polish(problem.graph, usable, fixed, exchange.aim, exchange.random)
            masks = polish(masks)
            exchange.take({name: counted(mask) for name, mask in masks.items()})
        self._note(problem, self.steps, exchange.figures)
        return masks

    def _draw(self, problem: Problem, exchange: Exchange, sweeps: Sweeps) -> dict[str, Tensor] | None:
        """Other beginnings, of more paths than the ascent found: half anywhere, half near the best.

        Where all are far below the floors of nodes and kernels, as on large networks, the one of most paths
        is returned: the exchange can raise it to them.
        """
        number = max(1, (self.steps - exchange.runs - self.steps // LAST) // DRAW)
        richest, low, taken, before = -math.inf, None, 0, exchange.runs
        for turn in problem.progress(range(number), "balance: sweeps", number):
            if turn == TRIED and not taken:
                number = TRIED
                break
            drawn = sweeps.drawn(exchange.counts if 2 * turn > number else None)
            is_taken, figures = exchange.offer(drawn)
            taken += is_taken
            if figures.log_paths > richest:
                richest, low = figures.log_paths, drawn
        exchange.runs = before + DRAW * number
        return None if taken else low

    def _aim(self, start: Figures, layers: dict[str, int]) -> Aim:
        """The objective, over what the ascent found and what longer would have added to it."""
        for_paths, for_nodes, for_kernels = (weight + SLACK for weight in self.mixture.weights)
        # Where nodes alone count, a longer ascent would go on trading paths for them; where paths have a
        # small weight besides others, it would still add many.
        paths = self.mixture.weights[0]
        if self.mixture.weights == (0, 1, 0):
            more = -1.0
        elif self.for_paths or not paths:
            more = 0.7
        else:
            more = 2.5 if paths < 0.2 else 1.0
        whole = sum(layers.values())
        kernels = min(start.kernels + start.kernels // 50 + 1, whole)
        if self.mixture.weights[2] and not self.mixture.weights[0]:
            kernels = whole  # without a claim of paths, every weight can have a kernel to itself
        # More nodes than the ascent's are worth having, but not where most paths are asked for.
        nodes = start.nodes if self.for_paths else start.nodes + start.nodes // 10 + 1
        floor = Figures(start.log_paths + more, nodes, kernels)
        # Nothing pays for nodes and kernels that were there, but for paths where these are all that is asked.
        least = NOTHING if self.for_paths else Figures(NOTHING.log_paths, start.nodes, start.kernels)
        return Aim((for_paths, for_nodes, for_kernels), floor, least)

    def _climb(self, problem: Problem, exchange: Exchange, until: int, heat: float) -> None:
        """The exchange, up to so many counts in all, or until it stalls; seven in ten of them are heated."""
        start = noted = risen = exchange.runs
        length, best = until - start, exchange.value
        for _ in problem.progress(range(length), "balance: exchange", length):
            cold = (exchange.runs - start) / (0.7 * length)
            if exchange.runs > until or (exchange.runs > risen + STALLED and (cold > 1 or not heat)):
                break
            exchange.climb(heat * max(0.0, 1 - cold))
            if exchange.value > best + LITTLE:
                risen, best = exchange.runs, exchange.value
            if exchange.runs >= noted + EVERY:
                noted = exchange.runs
                self._note(problem, noted, exchange.figures)

    def _note(self, problem: Problem, step: int, figures: Figures) -> None:
        row = {"step": step, **figures._asdict(), "objective": self.mixture.value(figures)}
        for name, value in row.items():
            problem.history.setdefault(name, []).append(value)


def _with_more_nodes(aim: Aim) -> Aim:
    """A higher floor: on large networks DPaI at full length may end with more nodes than the short ascent."""
    return replace(aim, floor=aim.floor._replace(nodes=aim.floor.nodes + aim.floor.nodes // 10))


def _without_sale(aim: Aim, figures: Figures) -> Aim:
    """Nodes and kernels up to the floors are not given away any more, where ``figures`` have them."""
    nodes, kernels = min(aim.floor.nodes, figures.nodes), min(aim.floor.kernels, figures.kernels)
    return replace(aim, least=Figures(NOTHING.log_paths, nodes, kernels))


def _live(graph: ChannelGraph, name: str) -> Tensor:
    kernels: KernelSet = graph.kernels[name]
    return kernels.live_taps.expand(kernels.shape)


def _settled(problem: Problem, masks: Masks, layers: dict[str, int]) -> Masks:
    """Exactly what was asked for: what a granularity asks, or what dead taps still have to take."""
    scores = {
        name: (4.0 * mask + torch.rand(mask.shape, generator=problem.generator)).to(problem.device)
        for name, mask in masks.items()
    }
    return settled(problem, scores, layers, "balance")
