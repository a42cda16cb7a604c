"""DPaI: optimise masks for many paths, nodes and kernels, without data and without weights."""

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
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Figures, Objective
from fxprune.methods.dpai.topk_state import GranularTopK, make_topk
from fxprune.methods.dpai.weight_gradients import WeightGradients
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
"""Units per block on an accelerator, where an operation costs a launch."""
WINDOW = 300
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
        lr: Adam's learning rate
        tol: stop once ln paths, ln nodes and ln kernels (those that have a weight), averaged over 300 steps,
            differ by less than this from their averages over the 300 steps before; 0 never stops
        resolution: "channel" counts paths as on a periodic image, where only the number of weights of a
            kernel matters, and is many times faster; "spatial" is the paper's
        allocation: "erk", as in the authors' code, where densities are proportional to the sum over the
            product of a layer's dimensions; "equation15", the printed formula, where sparsities are
            proportional to one minus that

    The history (``gm.meta["fxprune"]["history"]``) holds ``step``, ``log_paths``, ``nodes``, ``kernels`` and
    ``objective`` at the resolution of the search, every 10 steps and at the end.

    Warns (``UserWarning``) if the masks leave no path, and names the least budget that would do.

    Deviations from the authors' code: its rescaling of every layer by its own maximum miscounts residual
    networks and counts dead nodes as effective; here counts and derivatives are exact. While the masks make
    no path at all, where the code divides by zero, scores follow the gradient of R with pruned weights
    counting 1e-9 instead of 0, which raises those that the nearest paths lack.

    Cost: at most ``steps`` counts of paths with their derivatives.
    When: with neither data nor weights; to trade paths against nodes and kernels by ``alpha`` and
        ``beta``.
    """
    _check_options(alpha, beta, steps, lr, tol)
    search = _Dpai(Objective(alpha, beta), steps, lr, tol, resolution, allocation)
    return Method(
        name="dpai",
        find=search.find,
        needs=frozenset({"graph"}),
        summary="masks that climb towards many paths, nodes and kernels; no data, no weights",
        paper="Xiang, Nguyen-Tri et al. 2025, DPaI, ICLR",
        scored=False,
        shards="shapes",
    )


def _check_options(alpha: float, beta: float, steps: int, lr: float, tol: float) -> None:
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
class _Dpai:
    """The method with its options."""

    objective: Objective
    steps: int
    lr: float
    tol: float
    resolution: Literal["channel", "spatial"]
    allocation: Literal["erk", "equation15"]

    def find(self, problem: Problem) -> Masks:
        """Run the ascent, stage by stage and with an entry of the history every ``EVERY`` steps."""
        with torch.no_grad():
            ascent, history = self._make_ascent(problem), _History(problem.history, self.objective)
            stages = list(self._stages(problem))
            runs = [(budget, run) for budget, steps in stages for run in _split_steps(steps)]
            current, final = stages[0][0], stages[-1][0]
            described = problem.progress(runs, history.describe, len(runs))
            for number, (budget, steps) in enumerate(described, start=1):
                if budget is not current:
                    ascent.set_budget(_layer_budgets(budget))
                    current = budget
                history.append(ascent.time, ascent.measured_step())
                for _ in range(steps - 1):
                    ascent.step()
                if budget is final and number < len(runs) and history.has_converged(self.tol):
                    break
            history.append(ascent.time, ascent.figures())
            masks = {name: mask.to(problem.device) for name, mask in ascent.masks().items()}
        if history.latest.log_paths == -math.inf:
            _warn_of_collapse(problem, masks)
        return masks

    def _make_ascent(self, problem: Problem) -> Ascent | DeviceAscent:
        """Draw the scores, and choose how gradients are computed: on a circuit, if that will do."""
        # Drawn on the CPU, so that a seed means the same masks on every device.
        magnitudes = {
            name: torch.randn(mask.shape, generator=problem.generator).abs().where(mask.cpu(), -torch.inf)
            for name, mask in problem.masks.items()
        }
        layers = _layer_budgets(next(self._stages(problem))[0])
        if problem.granularity != WEIGHT:
            make = GranularTopK.factory(problem.granularity, problem.masks)
            return Ascent(self._weight_gradients(problem), magnitudes, layers, self.lr, make)
        compiled = None if self.resolution == "spatial" else circuit(problem.graph)
        if compiled is None:
            return Ascent(self._weight_gradients(problem), magnitudes, layers, self.lr, make_topk)
        names, fixed = list(problem.masks), _fixed_masks(problem)
        if _is_host(problem.device):
            gradients = KernelGradients(compiled, names, fixed, self.objective)
            return Ascent(gradients, magnitudes, layers, self.lr, make_topk)
        gradients = KernelGradients(compiled, names, fixed, self.objective, problem.device, block=LAUNCH)
        on_device = {name: score.to(problem.device) for name, score in magnitudes.items()}
        return DeviceAscent(gradients, on_device, layers, self.lr)

    def _weight_gradients(self, problem: Problem) -> WeightGradients:
        names, fixed = list(problem.masks), _fixed_masks(problem)
        return WeightGradients(problem.graph, names, fixed, self.objective, self.resolution, problem.device)

    def _stages(self, problem: Problem) -> Iterator[tuple[Budget, int]]:
        """Yield the budget of each stage and its number of steps; a schedule makes more than one stage."""
        final = self._allocate(problem)
        if problem.schedule is None:
            yield final, self.steps
            return
        plan, start = resolve(problem.schedule, OneShot()), kept(problem.masks)
        for t in range(1, plan.rounds):
            steps = t * self.steps // plan.rounds - (t - 1) * self.steps // plan.rounds
            if steps:
                yield final.towards(partial(plan.density, t), start), steps
        yield final, self.steps - (plan.rounds - 1) * self.steps // plan.rounds

    def _allocate(self, problem: Problem) -> Budget:
        """Return the problem's budget with a number for every layer."""
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
    """Return each layer's share of ``number`` weights under equation 15.

    A layer's sparsity is c (1 - sum / product of its dimensions), capped at the weights it has (``room``),
    with one c for all layers that makes the shares sum to ``number``. Shares are real numbers.
    """
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


class _History:
    """Append figures to the problem's history, and compare them."""

    def __init__(self, columns: dict[str, list[float]], objective: Objective) -> None:
        self.objective, self.latest = objective, Figures(-math.inf, 0, 0)
        self.columns: dict[str, list[float]] = {
            name: columns.setdefault(name, []) for name in ("step", *Figures._fields, "objective")
        }

    def append(self, step: int, figures: Figures) -> None:
        self.latest = figures
        row = (step, *figures, self.objective.value(figures))
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def has_converged(self, tol: float) -> bool:
        """Return whether every figure that has a weight changes by less than ``tol`` between two windows."""
        window = WINDOW // EVERY
        if len(self.columns["step"]) < 2 * window:
            return False
        for name, weight in zip(Figures._fields, self.objective.weights, strict=True):
            values = self.columns[name][-2 * window :]
            if name != "log_paths":
                values = [math.log(max(value, 1)) for value in values]
            change = abs(math.fsum(values[window:]) - math.fsum(values[:window])) / window
            if weight and not change < tol:  # written so that it holds for NaN too
                return False
        return True

    def describe(self) -> str:
        """Return the text of the progress bar."""
        paths, nodes, kernels = self.latest
        return f"dpai: ln paths {paths:.2f}, {nodes} nodes, {kernels} kernels"


def _split_steps(steps: int) -> Iterator[int]:
    """Split ``steps`` into runs of ``EVERY``."""
    return (min(EVERY, steps - start) for start in range(0, steps, EVERY))


def _layer_budgets(budget: Budget) -> dict[str, int]:
    assert budget.layers is not None, "allocated before"
    return budget.layers


def _is_host(device: torch.device) -> bool:
    """Return whether the host computes on this device, so that reading a number from it takes no wait."""
    return device.type == "cpu"


def _fixed_masks(problem: Problem) -> Masks:
    """Return the masks of parameters that are not pruned now but were before: some of their values are 0."""
    masks: Masks = {}
    for name in problem.graph.kernels.keys() - problem.masks.keys():
        is_nonzero = problem.model.get_parameter(name).detach() != 0
        if is_nonzero.any() and not is_nonzero.all():
            masks[name] = is_nonzero
    return masks


def _warn_of_collapse(problem: Problem, masks: Masks) -> None:
    """Warn that the masks leave no path, and name the least budget that a path through every layer takes."""
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
