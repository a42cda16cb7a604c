"""Pictures: a report, masks, a history or the results of a sweep come in, a matplotlib figure goes out.

Needs the extra ``plot``: ``pip install 'fxprune[plot]'``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import nn

from fxprune.keywords import refuse_unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare", "density", "history", "layer_densities", "masks", "plot_history"]


class Swept(Protocol):
    """The rows of a sweep, as :class:`fxprune.sweeps.Results` has them."""

    rows: list[dict[str, Any]]


class Layer(Protocol):
    """Describe what is drawn of a layer."""

    params: int
    kept_params: int
    effective_params: int


class Report(Protocol):
    """Describe what is drawn of a report."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name."""


STEP = "step"
LABELS = {
    "log_paths": "ln paths",
    "nodes": "effective nodes",
    "kernels": "effective kernels",
    "objective": "objective",
}


def plot_history(source: nn.Module | Mapping[str, Sequence[float]], **others: NoReturn) -> Figure:
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
    refuse_unknown(plot_history, others)
    history = _history_of(source)
    steps = history[STEP]
    columns = [name for name in history if name != STEP]
    figure = _figure(6, 1 + 1.6 * len(columns))
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


history = plot_history


def density(report: Report) -> Figure:
    """Draw the density and the effective density of every layer of a report, as bars.

    Args:
        report: what :func:`fxprune.analyze` returned.

    >>> import torch, fxprune
    >>> figure = density(fxprune.analyze(nn.Linear(4, 2), example_inputs=torch.ones(1, 4)))
    >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
    [1.0, 1.0]
    """
    if isinstance(report, nn.Module):
        raise TypeError(f"report: expected what fxprune.analyze returns, got a {type(report).__name__}")
    names = list(report.layers)
    kept = [layer.kept_params / layer.params for layer in report.layers.values()]
    effective = [layer.effective_params / layer.params for layer in report.layers.values()]
    figure = _figure(7, 1 + 0.22 * len(names))
    axes = figure.add_subplot()
    axes.barh(names, kept, height=0.8, label="density", color="#b8c4d6")
    axes.barh(names, effective, height=0.4, label="effective", color="#2f5d9b")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="fraction of the weights")
    axes.legend(loc="lower right")
    return figure


def masks(masks: Mapping[str, torch.Tensor], names: Sequence[str] | None = None) -> Figure:
    """Draw masks as pictures of kernels: rows are output channels, the shade is the share of taps kept.

    Args:
        masks: as :func:`fxprune.masks` returns them.
        names: which of them to draw; all by default.

    Raises ``ValueError`` for a name that has no mask.

    >>> import torch
    >>> figure = masks({"fc.weight": torch.ones(4, 6, dtype=torch.bool)})
    >>> figure.axes[0].get_title()
    'fc.weight'
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected what fxprune.masks returns, got a {type(masks).__name__}")
    chosen = list(masks) if names is None else list(names)
    if not chosen:
        raise ValueError("masks: there are none to draw")
    for name in chosen:
        if name not in masks:
            raise ValueError(f"names: {name!r} has no mask; there are {', '.join(list(masks)[:4])}")
    columns = min(4, max(1, len(chosen)))
    rows = -(-len(chosen) // columns)
    figure = _figure(3 * columns, 3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(grid, chosen, strict=False):
        mask = masks[name].detach().cpu()
        share = mask.float().flatten(2).mean(2) if mask.dim() > 2 else mask.float().view(len(mask), -1)
        axes.imshow(share.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=8)
    for axes in grid:
        axes.set_axis_off()
    return figure


def compare(rows: Sequence[Mapping[str, Any]] | Swept, y: str = "accuracy", x: str = "sparsity") -> Figure:
    """Draw one number of a sweep against another, a line for each method, with bands of one deviation.

    Args:
        rows: ``fxprune.sweep(...)``, or its ``rows``: dicts with ``method``, ``sparsity``, ``seed``, numbers.
        y, x: the numbers; each point is the mean over seeds at one sparsity.

    Raises ``ValueError`` where no row has the numbers.

    >>> rows = [{"method": "snip", "sparsity": s, "seed": 0, "accuracy": 1 - s} for s in (0.5, 0.9)]
    >>> [line.get_label() for line in compare(rows).axes[0].lines]
    ['snip']
    """
    listed = rows if isinstance(rows, Sequence) else rows.rows
    found = [row for row in listed if row.get(y) is not None and row.get(x) is not None]
    if not found:
        known = ", ".join(dict.fromkeys(key for row in listed for key in row))
        raise ValueError(f"rows: none has {y!r} and {x!r}; there are {known or 'none'}")
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in found):
        groups: dict[float, list[tuple[float, float]]] = {}
        for row in found:
            if row["method"] == method:
                groups.setdefault(row["sparsity"], []).append((float(row[x]), float(row[y])))
        points = sorted(
            (statistics.fmean(a for a, _ in some), statistics.fmean(b for _, b in some),
             statistics.stdev([b for _, b in some]) if len(some) > 1 else 0.0)
            for some in groups.values()
        )  # fmt: skip
        at, mean, spread = zip(*points, strict=True)
        if len(points) == 1 and x == "sparsity" and at[0] == 0:
            axes.axhline(mean[0], color="gray", linestyle="--", label=method)
            continue
        (line,) = axes.plot(at, mean, marker="o", markersize=3, label=method)
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(at, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def layer_densities(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the densities of layers of a sweep: a panel for each sparsity, a line for each method.

    >>> rows = [{"method": "snip", "sparsity": 0.5, "seed": 0, "densities": {"a": 0.4, "b": 0.6}}]
    >>> layer_densities(rows).axes[0].lines[0].get_ydata().tolist()
    [0.4, 0.6]
    """
    found = [row for row in rows if row.get("densities")]
    if not found:
        raise ValueError("rows: none has 'densities'")
    sparsities = sorted({row["sparsity"] for row in found})
    figure = _figure(8, 2.6 * len(sparsities))
    for axes, sparsity in zip(
        figure.subplots(len(sparsities), 1, squeeze=False)[:, 0], sparsities, strict=True
    ):
        for method in dict.fromkeys(row["method"] for row in found):
            some = [
                row["densities"] for row in found if (row["method"], row["sparsity"]) == (method, sparsity)
            ]
            if some:
                axes.plot(
                    range(len(some[0])),
                    [statistics.fmean(one[name] for one in some) for name in some[0]],
                    marker=".",
                    label=method,
                )
        axes.set(title=f"sparsity {sparsity:g}", xlabel="layer", ylabel="density", yscale="log")
        axes.legend(fontsize=7)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fxprune[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _history_of(source: nn.Module | Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    if isinstance(source, nn.Module):
        notes = getattr(source, "meta", {}).get("fxprune", {})
        history: Mapping[str, Sequence[float]] = notes.get("history", {})
        if not history:
            raise ValueError(
                "source: this model has no history; only what apply(..., returns='graph') returns has one, "
                "for a method that keeps it, such as 'dpai'"
            )
    elif isinstance(source, Mapping):
        history = source
    else:
        raise TypeError(
            f"source: got a {type(source).__name__}, expected what apply returned, or a history of columns"
        )
    if STEP not in history or len(history) < 2:
        raise ValueError(
            f"source: a history has a column 'step' and others, got {', '.join(history) or 'none'}"
        )
    return history
