"""The report: a lowered network and its masks come in; how much is left, and how much of it has any effect.

*Effective* is what lies on a path from the network's input to its output. A kept weight that does not is
counted in the density, does nothing, and gets no gradient.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fxprune.channels.counts import count_kernels, count_nodes, dense_macs, masked_macs
from fxprune.channels.unpruned import contractions
from fxprune.graph import ChannelGraph, KernelSet
from fxprune.metrics.page import page, table
from fxprune.paths.count import log_paths, reach
from fxprune.paths.terms import count_terms
from fxprune.sparsity.collapse import dead_layers, live_layers
from fxprune.sparsity.masks import Masks, kept
from fxprune.whole_files import write_text

if TYPE_CHECKING:
    from rich.table import Table

Resolution = Literal["spatial", "channel"]
HEADINGS = ("layer", "shape", "kept", "density", "effective", "kernels", "nodes", "MACs")
WIDTH = 200  # columns are as wide as they have to be; this only bounds them


@dataclass(frozen=True)
class LayerReport:
    """One prunable parameter: what it has (``params``, ``kernels``, ``nodes``, ``macs``) and what is left."""

    shape: tuple[int, ...]
    params: int
    kept_params: int
    effective_params: int
    kernels: int
    effective_kernels: int
    nodes: int
    effective_nodes: int
    macs: int
    masked_macs: int

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.kept_params / self.params


@dataclass(frozen=True)
class ProductReport:
    """Contractions without prunable weights, such as the two products of an attention.

    ``macs``: multiply-adds for one sample of the dense network; ``masked_macs``: of those that are on a path.
    """

    macs: int
    masked_macs: int


@dataclass(frozen=True)
class Report:
    """Hold what :func:`fxprune.analyze` found.

    ``layers``: one :class:`LayerReport` per prunable parameter, by name, in the order of the network.
    ``products``: one :class:`ProductReport` per attention, or other contraction without prunable weights (a
    fixed filter), by the module that holds its layers or the node that computes it.
    ``log_paths``: natural logarithm of the number of effective paths (DPaI, appendix I), ``-inf`` for none.
    ``dead_layers``: parameters on some path of the dense network and on none of this one. ``opaque``: number
    of operations that no rule knew; where it is not 0, effective means "perhaps effective" behind them.
    ``outside``: the matrix weights on no known path, by name with their sizes, largest first;
    ``outside_removed`` of them are masked.
    ``asked``: the sparsity that was pruned to where the caller named none.
    ``resolution``: ``"spatial"`` tells positions apart, ``"channel"`` does not.
    Nodes, kernels and multiply-adds are counted as :mod:`fxprune.channels.counts` says.
    """

    network: str
    resolution: str
    layers: dict[str, LayerReport]
    log_paths: float
    dead_layers: tuple[str, ...]
    opaque: int
    products: dict[str, ProductReport]
    effective: Masks = field(repr=False, compare=False)
    outside: dict[str, int] = field(default_factory=dict)
    outside_removed: int = 0
    asked: str = ""

    @property
    def matrix_params(self) -> int:
        """Number of matrix weights: the prunable ones and those in ``outside``."""
        return self.params + sum(self.outside.values())

    @property
    def matrix_sparsity(self) -> float:
        """Fraction of all matrix weights that is removed."""
        removed = self.params - self.kept_params + self.outside_removed
        return removed / self.matrix_params if self.matrix_params else 0.0

    @property
    def params(self) -> int:
        """Number of prunable weights."""
        return sum(layer.params for layer in self.layers.values())

    @property
    def kept_params(self) -> int:
        """Number of weights that are kept."""
        return sum(layer.kept_params for layer in self.layers.values())

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept (1.0 when there are none)."""
        return self.kept_params / self.params if self.params else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed."""
        return 1 - self.density

    @property
    def layer_density(self) -> dict[str, float]:
        """Fraction of the weights that is kept, per parameter."""
        return {name: layer.density for name, layer in self.layers.items()}

    @property
    def effective_params(self) -> int:
        """Number of kept weights on at least one path."""
        return sum(layer.effective_params for layer in self.layers.values())

    @property
    def effective_kernels(self) -> int:
        """Number of kernels with an effective weight."""
        return sum(layer.effective_kernels for layer in self.layers.values())

    @property
    def effective_nodes(self) -> int:
        """Number of output channels with an effective incoming kernel, over all layers."""
        return sum(layer.effective_nodes for layer in self.layers.values())

    @property
    def kernels(self) -> int:
        """Number of kernels."""
        return sum(layer.kernels for layer in self.layers.values())

    @property
    def nodes(self) -> int:
        """Number of output channels, over all layers."""
        return sum(layer.nodes for layer in self.layers.values())

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense network, per sample: of its prunable layers and its products."""
        products = sum(product.macs for product in self.products.values())
        return products + sum(layer.macs for layer in self.layers.values())

    @property
    def masked_macs(self) -> int:
        """Multiply-adds of the kept weights, and of products on a path, per sample."""
        products = sum(product.masked_macs for product in self.products.values())
        return products + sum(layer.masked_macs for layer in self.layers.values())

    def effective_param_masks(self) -> Masks:
        """Parameter name -> bool tensor of its shape, ``True`` = kept and on at least one path. Copies."""
        return {name: mask.clone() for name, mask in self.effective.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as dicts, lists and plain values; ``log_paths`` is None without a path."""
        totals = (
            "density", "sparsity", "params", "kept_params", "effective_params", "kernels",
            "effective_kernels", "nodes", "effective_nodes", "macs", "masked_macs", "matrix_params",
            "matrix_sparsity",
        )  # fmt: skip
        return {
            "network": self.network,
            "resolution": self.resolution,
            **{name: getattr(self, name) for name in totals},
            "log_paths": self.log_paths if math.isfinite(self.log_paths) else None,
            "dead_layers": list(self.dead_layers),
            "opaque": self.opaque,
            "asked": self.asked,
            "outside": self.outside,
            "layers": {
                name: {**asdict(layer), "shape": list(layer.shape), "density": layer.density}
                for name, layer in self.layers.items()
            },
            "products": {name: asdict(product) for name, product in self.products.items()},
        }

    def to_json(self) -> str:
        """Write the numbers as JSON; ``log_paths`` is null where there is no path."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str] | None = None, notes: Sequence[str] = ()) -> str:
        """Write a page that needs no network: totals, densities, dead channels and the mask of each layer.

        Args:
            path: a file to write it to as well.
            notes: lines under the totals, such as what a measurement gave.

        Returns:
            The page, HTML.
        """
        text = page(self.to_dict(), self.effective, notes)
        if path is not None:
            write_text(path, text)
        return text

    def _repr_html_(self) -> str:
        return table(self.to_dict())

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=WIDTH, force_terminal=False, color_system=None)
        console.print(_table(self))
        console.print("\n".join(_remarks(self)), markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def measure(
    graph: ChannelGraph,
    masks: Mapping[str, torch.Tensor],
    resolution: Resolution = "spatial",
    outside: Mapping[str, int] | None = None,
    outside_removed: int = 0,
) -> Report:
    """The report on a lowered network under ``masks`` (parameters without a mask count as dense).

    ``outside``: sizes of the matrix weights that are no kernels of the graph; ``outside_removed`` of them are
    masked.
    Raises ``ValueError`` for a resolution that is neither ``"spatial"`` nor ``"channel"``.
    """
    if resolution not in ("spatial", "channel"):
        raise ValueError(f"resolution={resolution!r}: expected 'spatial' or 'channel'")
    whole = {
        name: masks[name] if name in masks else torch.ones(kernels.shape, dtype=torch.bool)
        for name, kernels in graph.kernels.items()
    }
    effective = {
        name: mask & whole[name].to(mask.device)
        for name, mask in reach(graph, whole, resolution=resolution).items()
    }
    ones = {name: mask.double() for name, mask in whole.items()}
    numbers = kept(whole)
    return Report(
        network=graph.name,
        resolution=resolution,
        layers={
            name: _layer(kernels, numbers[name], effective[name]) for name, kernels in graph.kernels.items()
        },
        log_paths=log_paths(graph, ones, resolution=resolution),
        dead_layers=dead_layers(graph, live_layers(effective), resolution),
        opaque=len(graph.opaque),
        products=_products(graph, whole, resolution),
        effective=effective,
        outside=dict(outside or {}),
        outside_removed=outside_removed,
    )


def _products(
    graph: ChannelGraph, masks: Mapping[str, torch.Tensor], resolution: Resolution
) -> dict[str, ProductReport]:
    """Count the products, and of each the part that has paths left, of all that have any."""
    found = contractions(graph)
    if not found:
        return {}
    left = count_terms(graph, masks, resolution=resolution)
    ever = count_terms(graph, {}, resolution=resolution)
    reports = {}
    for one in found:
        macs = [dense_macs(op, graph.samples) for op in one.ops]
        indices = [op.output.index for op in one.ops]
        shares = [left[index] / ever[index] if ever[index] else 0.0 for index in indices]
        masked = sum(count * share for count, share in zip(macs, shares, strict=True))
        reports[one.name] = ProductReport(one.macs, round(masked))
    return reports


def _layer(kernels: KernelSet, number: int, effective: torch.Tensor) -> LayerReport:
    return LayerReport(
        shape=tuple(kernels.shape),
        params=kernels.shape.numel(),
        kept_params=number,
        effective_params=int(effective.sum()),
        kernels=kernels.shape[0] * kernels.shape[1],
        effective_kernels=count_kernels(effective),
        nodes=kernels.out_space.size,
        effective_nodes=count_nodes(kernels, effective),
        macs=kernels.macs,
        masked_macs=masked_macs(kernels, number),
    )


def _table(report: Report) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    title = f"{report.network}, {report.resolution} resolution"
    if report.asked:
        title += f"; no sparsity was asked for: {report.asked}, the default"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_footer=True, pad_edge=False)
    rows = [_cells(name, "x".join(map(str, layer.shape)), layer) for name, layer in report.layers.items()]
    for heading, total in zip(HEADINGS, _cells("total", "", report), strict=True):
        left = heading == HEADINGS[0]
        # Of a column whose overflow is ignored, rich 15 does not justify the cells.
        overflow = "ignore" if left else "ellipsis"
        justify = "left" if left else "right"
        table.add_column(heading, total, justify=justify, no_wrap=True, overflow=overflow)  # type: ignore[arg-type]
    rows += [
        (name, "product", *[""] * (len(HEADINGS) - 3), _macs(product))
        for name, product in report.products.items()
    ]
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _cells(name: str, shape: str, counts: LayerReport | Report) -> tuple[str, ...]:
    return (
        name,
        shape,
        f"{counts.kept_params:,}",
        f"{counts.density:.2%}",
        f"{counts.effective_params:,}",
        f"{counts.effective_kernels:,} / {counts.kernels:,}",
        f"{counts.effective_nodes:,} / {counts.nodes:,}",
        _macs(counts),
    )


def _macs(counts: LayerReport | ProductReport | Report) -> str:
    return f"{_short(counts.masked_macs)} / {_short(counts.macs)}"


def _remarks(report: Report) -> list[str]:
    """The lines under the table."""
    count = f"e^{report.log_paths:.2f}" if math.isfinite(report.log_paths) else "none"
    lines = [
        f"kept {report.kept_params:,} of {report.params:,} weights: sparsity {report.sparsity:.4%}",
        f"effective paths: {count}; effective weights: {report.effective_params:,}",
    ]
    if report.outside:
        lines.insert(
            1,
            f"of all {report.matrix_params:,} matrix weights: sparsity {report.matrix_sparsity:.4%};"
            f" on no known path: {listed(report.outside)}",
        )
    if report.dead_layers:
        lines.append(f"dead layers: {', '.join(report.dead_layers)}")
    if report.opaque:
        lines.append(f"opaque operations: {report.opaque}; behind them, effective is an upper bound")
    return lines


def listed(sizes: Mapping[str, int], limit: int = 4) -> str:
    """The first few names with their sizes.

    >>> listed({"a": 2000, "b": 3}, limit=1)
    'a (2,000) and 1 more'
    """
    first = ", ".join(f"{name} ({size:,})" for name, size in list(sizes.items())[:limit])
    return first if len(sizes) <= limit else f"{first} and {len(sizes) - limit} more"


def _short(number: float) -> str:
    """Three digits and a unit.

    >>> _short(4089184256), _short(12)
    ('4.09G', '12')
    """
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
