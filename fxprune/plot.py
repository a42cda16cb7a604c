"""Pictures of what a method did: a history comes in, a matplotlib figure goes out.

Needs the extra ``plot``: ``pip install 'fxprune[plot]'``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_history"]

STEP = "step"
LABELS = {
    "log_paths": "ln paths",
    "nodes": "effective nodes",
    "kernels": "effective kernels",
    "objective": "objective",
}


def plot_history(source: nn.Module | Mapping[str, Sequence[float]]) -> Figure:
    """The objectives of a method over its steps, one panel each.

    Args:
        source: what :func:`fxprune.apply` returned (as a graph), or its history, which is
            ``gm.meta["fxprune"]["history"]``: columns of equal length, of which ``step`` is the horizontal
            axis. Steps without a path (ln R_P = -inf) are left out.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig("history.png")`` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the method kept no history (dpai does), or it has no ``step``.

    >>> from fxprune.plot import plot_history
    >>> figure = plot_history({"step": [0, 10, 20], "nodes": [30, 41, 45]})
    >>> figure.axes[0].get_ylabel()
    'effective nodes'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install 'fxprune[plot]'") from error
    history = _history_of(source)
    steps = history[STEP]
    columns = [name for name in history if name != STEP]
    figure = Figure(figsize=(6, 1 + 1.6 * len(columns)), layout="constrained")
    for axes, name in zip(
        figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0], columns, strict=True
    ):
        shown = [
            (step, value) for step, value in zip(steps, history[name], strict=True) if math.isfinite(value)
        ]
        axes.plot([step for step, _ in shown], [value for _, value in shown])
        axes.set_ylabel(LABELS.get(name, name))
        axes.grid(visible=True, alpha=0.3)
    figure.axes[-1].set_xlabel(STEP)
    return figure


def _history_of(source: nn.Module | Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    if isinstance(source, nn.Module):
        notes = getattr(source, "meta", {}).get("fxprune", {})
        history: Mapping[str, Sequence[float]] = notes.get("history", {})
        if not history:
            raise ValueError(
                "source: this model has no history; only what apply(..., returns='graph') returns has one, "
                "for a method that keeps it, such as 'dpai'"
            )
    else:
        history = source
    if STEP not in history or len(history) < 2:
        raise ValueError(
            f"source: a history has a column 'step' and others, got {', '.join(history) or 'none'}"
        )
    return history
