"""ASNI: one training run in which global magnitude pruning follows a sigmoid over the epochs."""

from __future__ import annotations

import math

from fxprune.methods import get
from fxprune.training.contract import TrainingMethod, shrink
from fxprune.training.numbers import fraction, integer, positive


def asni(
    sparsity: float | None,
    total: int,
    *,
    alpha: float | None = None,
    beta: float = 0.5,
    gamma: float | None = None,
    hold: int = 0,
) -> TrainingMethod:
    """Amenable Sparse Network Investigator (Damadi, Nouri, Pirsiavash, algorithm 1).

    After epoch e = 1..E = ``total``, the fraction ``p(e) = alpha * sigmoid((e - beta * E) / gamma)`` of all
    prunable weights is zero: those smallest in magnitude, in one comparison over all layers. Biases and norms
    stay. Zeros are the smallest of all, so that what is pruned stays pruned.

    Options:
        alpha: the fraction that the sigmoid tends to, in (0, 1); the paper's 98 is 0.98, the default. Given a
            sparsity instead, it is the one at which p ends there
        beta: the epoch at which pruning is fastest, as a fraction of all epochs
        gamma: the width of the sigmoid in epochs; a tenth of all epochs by default, as in most of the paper
        hold: epochs at the end without pruning, p(e) = p(E - hold) there

    The paper's table 2 does not report p(E). Its seven small networks have p(E - 2), ``hold=2``, to five
    weights, as a fraction of *all* parameters, biases and norms included; its VGGs and ResNet-18 too, within
    0.1 point. ResNet-50 has p(E), ``hold=0``, of the *prunable* weights. Two of its entries contradict the
    number of nonzeros beside them: Conv2 on MNIST (98.18, by its nonzeros 97.40) and ResNet-18 (96.14, by its
    nonzeros 95.96).

    Cost: nothing beside the training.
    When: to prune once while training, and to have a ticket of two numbers per layer.

    >>> method = asni(None, 4, alpha=0.9, gamma=1.0)
    >>> [round(fraction_pruned(e, 4, 0.9, 0.5, 1.0), 4) for e in range(1, 5)]
    [0.242, 0.45, 0.658, 0.7927]
    """
    integer("total", total, 1)
    integer("hold", hold, 0)
    if hold >= total:
        raise ValueError(f"hold={hold!r}: expected fewer epochs than total={total}")
    width = total / 10 if gamma is None else positive("gamma", gamma)
    if not isinstance(beta, (int, float)) or not math.isfinite(beta):
        raise ValueError(f"beta={beta!r}: expected a number, the middle as a fraction of all epochs")
    if sparsity is not None and alpha is not None:
        raise ValueError(f"sparsity={sparsity!r} and alpha={alpha!r}: give one of them, it decides the other")
    last = total - hold
    top = 0.98 if alpha is None else fraction("alpha", alpha)
    if sparsity is not None:
        top = fraction("sparsity", sparsity) / fraction_pruned(last, total, 1.0, beta, width)
    target = fraction_pruned(last, total, top, beta, width)
    magnitude = get("magnitude")
    return TrainingMethod(
        name="asni",
        target=target,
        due=lambda at: min(at, last) if at >= 1 else None,
        update=lambda moment: shrink(
            moment, 1 - fraction_pruned(moment.at, total, top, beta, width), magnitude
        ),
        summary="prunes by magnitude, all layers at once, along a sigmoid over the epochs",
        paper="Damadi, Nouri, Pirsiavash: Amenable Sparse Network Investigator",
    )


def fraction_pruned(epoch: int, total: int, alpha: float, beta: float, gamma: float) -> float:
    """``p(e) = alpha * sigmoid((e - beta * E) / gamma)``, a fraction.

    >>> round(fraction_pruned(50, 50, 0.98, 0.5, 5.0), 5)
    0.97344
    """
    argument = (epoch - beta * total) / gamma
    if argument >= 0:  # so that neither end overflows
        return alpha / (1 + math.exp(-argument))
    return alpha * math.exp(argument) / (1 + math.exp(argument))
