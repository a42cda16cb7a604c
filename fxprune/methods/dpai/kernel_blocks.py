"""Split the units of a group of layers into blocks that fit into a core's cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Size, Tensor

from fxprune.methods.dpai.outer_factors import OuterFactors

__all__ = ["BlockPart", "KernelBlock", "allocate_block", "split_units"]


class BlockPart(NamedTuple):
    """The units of one layer in a block: those into the output channels ``rows``.

    ``gradient`` and ``factor`` are their views of two buffers. Where the layer's gradient is an outer
    product, both have shape (rows, units of a row), and ``slope``, ``x`` and ``node_factor`` are the views of
    the factors that belong to the rows; else both are flat, and ``rows`` are all.
    """

    name: str
    rows: slice
    gradient: Tensor
    factor: Tensor
    slope: Tensor | None = None
    x: Tensor | None = None
    node_factor: Tensor | None = None


class KernelBlock(NamedTuple):
    """Some consecutive units of a group, and the layers' parts of them."""

    units: slice
    parts: list[BlockPart]


LayerRows = list[tuple[str, slice]]


def split_units(
    units: Mapping[str, slice], shapes: Mapping[str, Size], is_divisible: Mapping[str, bool], size: int
) -> list[tuple[slice, LayerRows]]:
    """Split a group into blocks of at most ``size`` units, or of one output channel if it has more.

    ``units``: the slice of each layer; ``shapes``: of the kernels; ``is_divisible``: layers that may be
    split, between output channels. Returns the units of each block, with the layers in it and their output
    channels.
    """
    blocks: list[tuple[slice, LayerRows]] = []
    for name, own in units.items():
        height = shapes[name][0]
        row = (own.stop - own.start) // height
        step = max(1, size // row) if is_divisible[name] else height
        for first in range(0, height, step):
            rows = slice(first, min(height, first + step))
            start, stop = own.start + rows.start * row, own.start + rows.stop * row
            if blocks and stop - blocks[-1][0].start <= size:
                before, layers = blocks.pop()
                blocks.append((slice(before.start, stop), [*layers, (name, rows)]))
            else:
                blocks.append((slice(start, stop), [(name, rows)]))
    return blocks


def allocate_block(
    units: slice,
    layers: LayerRows,
    units_of_row: Mapping[str, int],
    buffers: tuple[Tensor, Tensor],
    factors: OuterFactors,
) -> KernelBlock:
    """Take the views of ``buffers`` (gradient, factor) and ``factors`` that the parts of a block need."""
    parts, start = [], 0
    for name, rows in layers:
        row = units_of_row[name]
        size = (rows.stop - rows.start) * row
        is_outer = name in factors.places
        shape = (-1, row) if is_outer else (-1,)
        gradient, factor = (buffer[start : start + size].view(shape) for buffer in buffers)
        part = BlockPart(name, rows, gradient, factor)
        if is_outer:
            part = part._replace(
                slope=factors.slopes[name][..., rows],
                x=factors.x[name],
                node_factor=factors.node_factors[name][rows],
            )
        parts.append(part)
        start += size
    return KernelBlock(units, parts)
