"""SET and RigL: sparse from the first step, weights drop and others grow in their place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fxprune.methods import get
from fxprune.sparsity.budget import Budget, count
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select
from fxprune.training.contract import Grown, Moment, TrainingMethod
from fxprune.training.numbers import fraction, integer

Growth = Callable[[Moment], dict[str, torch.Tensor]]
"""The score by which pruned weights come back, the highest first."""


def rigl(
    sparsity: float | None,
    total: int,
    *,
    frequency: int = 100,
    drop: float = 0.3,
    stop: float = 0.75,
    grown: Grown = "zero",
) -> TrainingMethod:
    """Rigging the lottery (Evci et al. 2020, arXiv 1911.11134, algorithm 1).

    Random masks to begin with, at densities after Erdős-Rényi-kernel unless ``budget`` says otherwise. Every
    ``frequency`` steps t before ``stop * total``, each layer loses the fraction
    ``drop / 2 * (1 + cos(pi * t / (stop * total)))`` of its weights, those smallest in magnitude, and gains
    as many: those with the largest gradient among all that are not left, so that one just dropped may stay as
    it is. ``Pruner.step`` must be given a loss, for the gradients of weights that are not there.

    Options:
        frequency: steps from one update to the next
        drop: the fraction of a layer's weights that goes at first
        stop: the fraction of the training after which masks stay as they are
        grown: a weight that comes back starts from "zero", or from the "dense" value that it was pruned at

    Cost: a gradient of all weights, pruned ones too, every ``frequency`` steps.
    When: to train sparse from the first step, at a fixed number of weights.
    """
    return _drop_and_grow(
        "rigl", sparsity, total, frequency, drop, stop, grown, _gradient_size, frozenset({"gradients"}),
        "drops the smallest weights and grows those with the largest gradients",
        "Evci et al. 2020, arXiv 1911.11134",
    )  # fmt: skip


def sparse_evolution(
    sparsity: float | None,
    total: int,
    *,
    frequency: int = 100,
    drop: float = 0.3,
    stop: float = 0.75,
    grown: Grown = "zero",
) -> TrainingMethod:
    """Sparse evolutionary training, SET (Mocanu et al. 2018, arXiv 1707.04780), as RigL's paper compares it.

    As RigL, but what grows is drawn at random. The first paper drops the same fraction each time and
    separately among positive and negative weights; here it falls with a cosine, and size alone decides.

    Options:
        frequency: steps from one update to the next
        drop: the fraction of a layer's weights that goes at first
        stop: the fraction of the training after which masks stay as they are
        grown: a weight that comes back starts from "zero", or from the "dense" value that it was pruned at

    Cost: a few comparisons every ``frequency`` steps.
    When: as `rigl`, without gradients of pruned weights.
    """
    return _drop_and_grow(
        "set", sparsity, total, frequency, drop, stop, grown, _chance, frozenset(),
        "drops the smallest weights and grows others at random", "Mocanu et al. 2018, arXiv 1707.04780",
    )  # fmt: skip


def _drop_and_grow(
    name: str,
    sparsity: float | None,
    total: int,
    frequency: int,
    drop: float,
    stop: float,
    grown: Grown,
    growth: Growth,
    needs: frozenset[str],
    summary: str,
    paper: str,
) -> TrainingMethod:
    if sparsity is None:
        raise ValueError(f"sparsity=None: method {name!r} needs the sparsity it keeps, as in sparsity=0.9")
    every = integer("frequency", frequency, 1)
    most = fraction("drop", drop)
    if grown not in ("zero", "dense"):
        raise ValueError(f"grown={grown!r}: expected 'zero' or 'dense'")
    end = fraction("stop", stop) * integer("total", total, 1)
    # The last multiple of the frequency that lies before the end.
    last = (math.ceil(end) - 1) // every * every

    def due(at: int) -> int | None:
        return min(at // every * every, last) if at >= every and last else None

    return TrainingMethod(
        name=name,
        target=fraction("sparsity", sparsity),
        due=due,
        update=lambda moment: exchange(moment, most / 2 * (1 + math.cos(math.pi * moment.at / end)), growth),
        begin=lambda moment: get("random").masks(moment.problem),
        budget="erk",
        grown=grown,
        needs=needs,
        summary=summary,
        paper=paper,
    )


def exchange(moment: Moment, part: float, growth: Growth) -> Masks:
    """Masks in which every layer has lost ``part`` of its weights and gained as many.

    Fewer where a layer has fewer pruned weights than that; the numbers of weights in all layers stay.
    """
    masks, problem = moment.masks, moment.problem
    numbers = kept(masks)
    moved = {name: min(count(number, part), masks[name].numel() - number) for name, number in numbers.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    sized = {name: weight.abs() for name, weight in problem.weights.items()}
    left = _best(sized, {name: numbers[name] - moved[name] for name in masks}, masks, sizes)
    free = {name: ~mask for name, mask in left.items()}
    new = _best(growth(moment), moved, free, sizes)
    return {name: left[name] | new[name] for name in masks}


def _best(
    scores: dict[str, torch.Tensor], numbers: dict[str, int], within: Masks, sizes: dict[str, int]
) -> Masks:
    return select(scores, Budget(sum(numbers.values()), sizes, numbers), within=within)


def _gradient_size(moment: Moment) -> dict[str, torch.Tensor]:
    return {name: gradient.abs() for name, gradient in moment.gradients().items()}


def _chance(moment: Moment) -> dict[str, torch.Tensor]:
    # Drawn on the CPU, so that a seed means the same masks on every device and every process.
    generator = moment.problem.generator
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in moment.problem.weights.items()
    }
