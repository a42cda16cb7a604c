"""Compile products of two values to functions of two reduced tensors.

Each compile function takes an op and the layouts of its factors, and returns the layout of the result and the
function. Axes that are summed away count every class as often as it occurs, so that the result is that of the
full tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.layout import AxisMap, Layout, explicit, join, layout_of_labels, reader, reduced_shape

__all__ = ["Product", "compile_product"]

Product = Callable[[Tensor, Tensor], Tensor]


def compile_product(op: ir.Gate | ir.Mix, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Compile a Gate or a Mix."""
    match op:
        case ir.Gate():
            return _gate(op, a, b)
        case ir.Mix():
            return _mix(op, a, b)
        case _:
            ir.refuse_kind(op)


def _gate(op: ir.Gate, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Compile an elementwise product."""
    layout = join([a, b], op.output.shape)
    read_a, read_b = reader(a, layout), reader(b, layout)
    return layout, lambda x, y: read_a(x) * read_b(y)


def _mix(op: ir.Mix, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Compile ``einsum(equation, a, b)``, or any other bilinear function."""
    if op.product is not None:
        return _function(op.product, a, b)
    left, right, out = _letters(op.equation)
    maps = _joined_axes((left, a), (right, b))
    read_a, read_b = _operand_reader(left, a, maps), _operand_reader(right, b, maps)
    summed = [c for c in dict.fromkeys(left + right) if c not in out]
    scale = math.prod(maps[c].size for c in summed if maps[c].is_collapsed)
    # A partition that is summed over: a vector of multiplicities is one more operand.
    partitions = [c for c in summed if not maps[c].is_collapsed and not maps[c].is_explicit]
    multiplicities = [maps[c].multiplicity().double() for c in partitions]
    equation = ",".join([left, right, *partitions]) + "->" + out
    layout = tuple(maps[c] for c in out)
    shape = reduced_shape(layout)

    def mix(x: Tensor, y: Tensor) -> Tensor:
        more = [multiplicity.to(x) for multiplicity in multiplicities]
        result = torch.einsum(equation, read_a(x), read_b(y), *more)
        return (result * scale if scale != 1 else result).expand(shape)

    return layout, mix


def _joined_axes(*operands: tuple[str, Layout]) -> dict[str, AxisMap]:
    """For every letter of an einsum, the coarsest map that refines those of the axes that it names."""
    maps: dict[str, AxisMap] = {}
    for letters, layout in operands:
        for letter, axis in zip(letters, layout, strict=True):
            known = [axis, maps[letter]] if letter in maps else [axis]
            size = max(each.size for each in known)
            maps[letter] = join([(each,) for each in known], (size,))[0]
    return maps


def _operand_reader(letters: str, layout: Layout, maps: dict[str, AxisMap]) -> Callable[[Tensor], Tensor]:
    """Function that reads an operand at the joined axes, but for those that einsum broadcasts."""
    fine = (axis if axis.is_collapsed else maps[c] for c, axis in zip(letters, layout, strict=True))
    return reader(layout, tuple(fine))


def _letters(equation: str) -> tuple[str, str, str]:
    """Split ``"left,right->out"``."""
    operands, _, out = equation.partition("->")
    left, _, right = operands.partition(",")
    return left, right, out


def _function(product: Product, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Compile a bilinear function of two full tensors; a run on random integers shows the result's layout."""
    full_a = tuple(explicit(axis.size) for axis in a)
    full_b = tuple(explicit(axis.size) for axis in b)
    read_a, read_b = reader(a, full_a), reader(b, full_b)
    generator = torch.Generator().manual_seed(0x5EED)

    def draw(layout: Layout) -> Tensor:
        return torch.randint(1, 2**20, reduced_shape(layout), generator=generator).double()

    labels = product(read_a(draw(a)), read_b(draw(b)))
    layout, _ = layout_of_labels(labels.long())
    picks = [(dim, axis.representatives()) for dim, axis in enumerate(layout) if not axis.is_explicit]

    def run(x: Tensor, y: Tensor) -> Tensor:
        result = product(read_a(x), read_b(y))
        for dim, index in picks:
            result = result.index_select(dim, index.to(result.device))
        return result

    return layout, run
