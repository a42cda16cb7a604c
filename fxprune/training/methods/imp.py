"""Iterative magnitude pruning: after every training a fraction of the surviving weights goes."""

from __future__ import annotations

from fxprune.methods import Method
from fxprune.training.contract import TrainingMethod, resolve_criterion, shrink
from fxprune.training.numbers import fraction, integer


def imp(
    sparsity: float | None,
    total: int,
    *,
    rate: float | None = None,
    criterion: str | Method = "magnitude",
) -> TrainingMethod:
    """Iterative magnitude pruning (Frankle & Carbin 2019, arXiv 1803.03635; Frankle et al. 2019, 1903.01611).

    ``step(r)`` after training number r = 1..``total`` leaves ``(1 - rate)^r`` of the weights. What they are
    set back to then is ``Pruner.reinitialize``'s; ``fxprune.lottery`` does both.

    Options:
        rate: the fraction of the survivors that goes each time, 0.2 by default; or it follows from sparsity
        criterion: which weights go, a name of ``list_methods()`` or a ``Method``

    Cost: as many trainings as rounds.
    When: for research on lottery tickets, and where many trainings can be paid.

    >>> round(imp(None, 3).target, 3)
    0.488
    """
    integer("total", total, 1)
    if sparsity is not None and rate is not None:
        raise ValueError(f"sparsity={sparsity!r} and rate={rate!r}: give one of them, it decides the other")
    if sparsity is not None:
        left = (1 - fraction("sparsity", sparsity)) ** (1 / total)
    else:
        left = 1 - fraction("rate", 0.2 if rate is None else rate)
    chosen = resolve_criterion(criterion)
    return TrainingMethod(
        name="imp",
        target=1 - left**total,
        due=lambda at: min(at, total) if at >= 1 else None,
        update=lambda moment: shrink(moment, left**moment.at, chosen),
        needs=chosen.needs,
        summary="prunes a fraction of what is left after each of several trainings",
        paper="Frankle & Carbin 2019, arXiv 1803.03635",
    )
