"""Gradual magnitude pruning: sparsity rises along a cubic while the network trains."""

from __future__ import annotations

from fxprune.methods import Method
from fxprune.sparsity import schedule as schedules
from fxprune.sparsity.masks import Masks
from fxprune.training.contract import Moment, TrainingMethod, resolve_criterion, shrink
from fxprune.training.numbers import fraction, integer


def gmp(
    sparsity: float | None,
    total: int,
    *,
    begin: int = 0,
    end: int | None = None,
    frequency: int = 1,
    initial: float = 0.0,
    criterion: str | Method = "magnitude",
    schedule: str = "cubic",
) -> TrainingMethod:
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1).

    ``s(t) = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin))^3`` at t = begin, begin + frequency, ...,
    and s_f exactly at ``end``. Masks only shrink; after ``end`` they stay. Weights compete over all layers
    unless ``budget`` says otherwise (the paper has ``budget="uniform"``).

    Options:
        begin: the first step or epoch that prunes
        end: the last; ``total`` by default
        frequency: steps or epochs from one update to the next
        initial: the sparsity at ``begin``, s_i
        criterion: which weights go, a name of ``list_methods()`` or a ``Method``
        schedule: "cubic", or another name that ``fxprune.apply`` knows

    Cost: nothing beside the training, but for a criterion that looks at data.
    When: to prune while training or fine-tuning, where there is time for it.

    >>> gmp(0.9, 10, end=10).due(7), gmp(0.9, 10, frequency=4).due(7)
    (7, 4)
    """
    if sparsity is None:
        raise ValueError("sparsity=None: method 'gmp' needs the sparsity to end at, as in sparsity=0.9")
    target = fraction("sparsity", sparsity)
    first, last, every = _window(total, begin, end, frequency)
    if not 0 <= initial <= target:
        raise ValueError(f"initial={initial!r}: expected a fraction from 0 to sparsity={sparsity!r}")
    chosen = resolve_criterion(criterion)
    curve = schedules.resolve(schedule, schedules.Cubic(last - first))

    def due(at: int) -> int | None:
        latest = last if at >= last else first + (at - first) // every * every
        return None if at < first else latest

    def update(moment: Moment) -> Masks:
        # The curve runs from 1 to the target, both relative to where it starts, in rounds of its own.
        done, start = -(-(moment.at - first) * curve.rounds // (last - first)), 1 - initial
        if done == curve.rounds:
            return shrink(moment, 1 - target, chosen)
        return shrink(moment, start * (curve.density(done, (1 - target) / start) if done else 1.0), chosen)

    return TrainingMethod(
        name="gmp",
        target=target,
        due=due,
        update=update,
        needs=chosen.needs,
        summary="prunes by magnitude along a cubic over the steps",
        paper="Zhu & Gupta 2017, arXiv 1710.01878",
    )


def _window(total: int, begin: int, end: int | None, frequency: int) -> tuple[int, int, int]:
    integer("total", total, 1)
    first = integer("begin", begin, 0)
    last = integer("end", total if end is None else end, 1)
    if not first < last <= total:
        raise ValueError(f"begin={begin!r}, end={last!r}: expected begin < end <= total={total}")
    return first, last, integer("frequency", frequency, 1)
