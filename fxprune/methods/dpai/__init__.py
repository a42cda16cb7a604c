"""DPaI: masks that climb towards many paths, nodes and kernels, without data and without weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fxprune.methods.dpai.accelerator import DeviceAscent
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelReading
from fxprune.methods.dpai.objective import Figures, Mixture, WeightReading
from fxprune.methods.dpai.topk_state import Selection, contest_of
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import reach
from fxprune.scoring.contract import Method, Problem
from fxprune.sparsity.budget import Budget, apportion, erk_ratios
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks, kept, total
from fxprune.sparsity.schedule import OneShot, resolve

EVERY = 10
"""Steps between two entries of the history."""
LAUNCH = 1 << 26
"""Units that an accelerator handles in one operation."""
PATIENCE = 300
"""Steps over which figures are averaged before they are compared."""


def dpai(
    *,
    alpha: float = 0.99,
    beta: float = 0.5,
    steps: int = 3000,
    lr: float = 0.005,
    tol: float = 2e-3,
    resolution: Literal["channel", "spatial"] = "channel",
    allocation: Literal["erk", "equation15"] = "erk",
) -> Method:
    """Differentiable pruning at initialization (Xiang, Nguyen-Tri, Nguyen et al., DPaI, ICLR 2025).

    Maximises ``(1 - alpha) ln R_P + alpha [(1 - beta) ln R_N + beta ln R_C]``: R_P effective paths, R_N
    effective nodes (channels with an effective incoming kernel, in every layer), R_C effective kernels.
    Scores s ~ N(0, 1); in every layer the masks keep exactly the budget's number of the largest |s|; scores
    follow the straight-through gradient (eqs. 2 and 6) under Adam. Needs nothing: the masks depend on the
    architecture, the budget and the seed alone. A budget that does not fix layers is split by ``allocation``.

    Options:
        alpha: weight of nodes and kernels, against paths, in [0, 1]
        beta: weight of kernels, against nodes, in [0, 1]
        steps: steps of Adam, at most
        lr: learning rate, the distance that a score goes in a step
        tol: stop once ln paths, ln nodes and ln kernels (those that have a weight) change by less than this
            from one 300 steps to the next, on average; 0 never stops
        resolution: "channel" counts a kernel by the number of its weights, as on a periodic image, and is
            many times faster; "spatial" is the paper's
        allocation: "erk", as in the authors' code, where densities are proportional to the sum over the
            product of a layer's dimensions; "equation15", the printed formula, where sparsities are
            proportional to one minus that

    The history (``gm.meta["fxprune"]["history"]``) holds ``step``, ``log_paths``, ``nodes``, ``kernels`` and
    ``objective`` at the resolution of the search, every 10 steps and at the end.

    Warns (``UserWarning``) if no path is left, and says how many weights it takes.

    Deviations from the authors' code: its rescaling of every layer by its own maximum miscounts residual
    networks and lets dead nodes pass for effective; here counts and derivatives are exact. While the masks
    make no path at all, where the code divides by zero, what the nearest paths lack rises first.
    """
    _check(alpha, beta, steps, lr, tol)
    search = _Search(Mixture(alpha, beta), steps, lr, tol, resolution, allocation)
    return Method(
        name="dpai",
        find=search.find,
        summary="masks that climb towards many paths, nodes and kernels; no data, no weights",
        paper="Xiang, Nguyen-Tri et al. 2025, DPaI, ICLR",
        scored=False,
        shards="shapes",
    )


def _check(alpha: float, beta: float, steps: int, lr: float, tol: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"method 'dpai': {name}={value!r}, expected a number in [0, 1]")
    if steps < 1:
        raise ValueError(f"method 'dpai': steps={steps!r}, expected an integer of at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"method 'dpai': lr={lr!r}, expected a number above 0")
    if not 0 <= tol < math.inf:
        raise ValueError(f"method 'dpai': tol={tol!r}, expected a number of at least 0")


@dataclass(frozen=True)
class _Search:
    """The options, checked."""

    mixture: Mixture
    steps: int
    lr: float
    tol: float
    resolution: Literal["channel", "spatial"]
    allocation: Literal["erk", "equation15"]

    def find(self, problem: Problem) -> Masks:
        with torch.no_grad():
            ascent, log = self._start(problem), _Log(problem.history, self.mixture)
            stages = list(self._stages(problem))
            blocks = [(budget, n) for budget, count in stages for n in _blocks(count)]
            present = stages[0][0]
            for place, (budget, count) in enumerate(
                problem.progress(blocks, log.words, len(blocks)), start=1
            ):
                if budget is not present:
                    ascent.resize(_layers(budget))
                    present = budget
                log.add(ascent.time, ascent.measured_step())
                for _ in range(count - 1):
                    ascent.step()
                is_last_stage = budget is stages[-1][0]
                if is_last_stage and place < len(blocks) and log.has_converged(self.tol):
                    break
            log.add(ascent.time, ascent.figures())
            masks = {name: mask.to(problem.device) for name, mask in ascent.masks().items()}
        if log.latest.log_paths == -math.inf:
            _warn_of_collapse(problem, masks)
        return masks

    def _start(self, problem: Problem) -> Ascent | DeviceAscent:
        # Drawn on the CPU, so that a seed means the same masks on every device.
        magnitudes = {
            name: torch.randn(mask.shape, generator=problem.generator).abs().where(mask.cpu(), -torch.inf)
            for name, mask in problem.masks.items()
        }
        layers = _layers(next(self._stages(problem))[0])
        if problem.granularity != WEIGHT:
            rule = Selection.under(problem.granularity, problem.masks)
            return Ascent(self._whole_reading(problem), magnitudes, layers, self.lr, rule)
        found = None if self.resolution == "spatial" else circuit(problem.graph)
        if found is None:
            return Ascent(self._whole_reading(problem), magnitudes, layers, self.lr, contest_of)
        names, fixed = list(problem.masks), _fixed(problem)
        if _is_host(problem.device):
            reading = KernelReading(found, names, fixed, self.mixture)
            return Ascent(reading, magnitudes, layers, self.lr, contest_of)
        reading = KernelReading(found, names, fixed, self.mixture, problem.device, block=LAUNCH)
        there = {name: score.to(problem.device) for name, score in magnitudes.items()}
        return DeviceAscent(reading, there, layers, self.lr)

    def _whole_reading(self, problem: Problem) -> WeightReading:
        names, fixed = list(problem.masks), _fixed(problem)
        return WeightReading(problem.graph, names, fixed, self.mixture, self.resolution, problem.device)

    def _stages(self, problem: Problem) -> Iterator[tuple[Budget, int]]:
        """What is kept, and for how many steps; more than one stage under a schedule."""
        final = self._split(problem)
        if problem.schedule is None:
            yield final, self.steps
            return
        plan, start = resolve(problem.schedule, OneShot()), kept(problem.masks)
        for t in range(1, plan.rounds):
            steps = t * self.steps // plan.rounds - (t - 1) * self.steps // plan.rounds
            if steps:
                yield final.towards(partial(plan.density, t), start), steps
        yield final, self.steps - (plan.rounds - 1) * self.steps // plan.rounds

    def _split(self, problem: Problem) -> Budget:
        """The problem's budget, with a number for every layer."""
        budget = problem.budget
        if budget.layers is not None:
            return budget
        shapes = {name: tuple(mask.shape) for name, mask in problem.masks.items()}
        room = problem.granularity.room(problem.masks)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        if self.allocation == "erk":
            shares = {name: ratio * sizes[name] for name, ratio in erk_ratios(shapes).items()}
        else:
            shares = _equation15(budget.total, shapes, room)
        most = min(budget.total, sum(room.values()))
        return Budget(most, budget.sizes, apportion(most, shares, room))


def _equation15(
    number: int, shapes: Mapping[str, tuple[int, ...]], room: Mapping[str, int]
) -> dict[str, float]:
    """Real shares with sparsity ``c (1 - sum / product of dims)``, cut to what a layer has, for one c."""
    ratios = erk_ratios(shapes)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}

    def shares(c: float) -> dict[str, float]:
        return {
            name: min(room[name], max(1e-9, 1 - c * (1 - min(1.0, ratio))) * sizes[name])
            for name, ratio in ratios.items()
        }

    low, high = 0.0, 2.0
    for _ in range(100):  # by bisection: the sum falls as c grows
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle).values()) > number else (low, middle)
    return shares(high)


class _Log:
    """The history as it is written, and the words for the progress bar."""

    def __init__(self, history: dict[str, list[float]], mixture: Mixture) -> None:
        self.mixture, self.latest = mixture, Figures(-math.inf, 0, 0)
        self.columns: dict[str, list[float]] = {
            name: history.setdefault(name, []) for name in ("step", *Figures._fields, "objective")
        }

    def add(self, step: int, figures: Figures) -> None:
        self.latest = figures
        row = (step, *figures, self.mixture.value(figures))
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def has_converged(self, tol: float) -> bool:
        """Whether no figure that has a weight changes by ``tol`` any more, on average."""
        window = PATIENCE // EVERY
        if len(self.columns["step"]) < 2 * window:
            return False
        for name, weight in zip(Figures._fields, self.mixture.weights, strict=True):
            values = self.columns[name][-2 * window :]
            if name != "log_paths":
                values = [math.log(max(value, 1)) for value in values]
            change = abs(math.fsum(values[window:]) - math.fsum(values[:window])) / window
            if weight and not change < tol:  # written so that it holds for NaN too
                return False
        return True

    def words(self) -> str:
        """What the progress bar says."""
        paths, nodes, kernels = self.latest
        return f"dpai: ln paths {paths:.2f}, {nodes} nodes, {kernels} kernels"


def _blocks(count: int) -> Iterator[int]:
    """``count`` steps in runs of ``EVERY``."""
    return (min(EVERY, count - start) for start in range(0, count, EVERY))


def _layers(budget: Budget) -> dict[str, int]:
    assert budget.layers is not None, "split before"
    return budget.layers


def _is_host(device: torch.device) -> bool:
    """Whether scores are compared where they are kept; elsewhere steps are best replayed without a look."""
    return device.type == "cpu"


def _fixed(problem: Problem) -> Masks:
    """Masks of parameters that are not to be pruned, where they were before: zeros among other values."""
    found: Masks = {}
    for name in problem.graph.kernels.keys() - problem.masks.keys():
        live = problem.model.get_parameter(name).detach() != 0
        if live.any() and not live.all():
            found[name] = live
    return found


def _warn_of_collapse(problem: Problem, masks: Masks) -> None:
    """Says that no path is left, and what budget a path through every layer takes at least."""
    open_ = reach(problem.graph, {name: mask.to(problem.device) for name, mask in problem.masks.items()})
    needed = [name for name in masks if bool(open_[name].any())]
    size = sum(mask.numel() for mask in masks.values())
    empty = [name for name in needed if not bool(masks[name].any())]
    where = f"; none in {', '.join(empty[:4])}{', ...' if len(empty) > 4 else ''}" if empty else ""
    if not needed:
        remedy = "there was no path before either"
    else:
        limit = math.floor((1 - len(needed) / size) * 1e6) / 1e6
        remedy = (
            f"every layer needs a weight, so that it takes {len(needed)} at least (sparsity <= {limit:g}); "
            "lower the sparsity"
        )
    warnings.warn(
        f"layer collapse: method 'dpai' keeps {total(masks)} of {size} weights, which make no path{where}: "
        f"{remedy}",
        stacklevel=5,
    )
