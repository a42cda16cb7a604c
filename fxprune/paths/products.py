"""What a product of two values does to reduced tensors: one compile function per form.

In: a Gate or Mix and the layouts of its factors. Out: the result's layout and a function of the two reduced
tensors. Letters that are summed away count every class as often as it occurs, so that the result is that of
the full tensors.
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
    """The function of the two factors' reduced tensors."""
    return _gate(op, a, b) if isinstance(op, ir.Gate) else _mix(op, a, b)


def _gate(op: ir.Gate, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Elementwise product."""
    layout = join([a, b], op.output.shape)
    read_a, read_b = reader(a, layout), reader(b, layout)
    return layout, lambda x, y: read_a(x) * read_b(y)


def _mix(op: ir.Mix, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """``einsum(equation, a, b)``: letters that are summed away count every class as often as it occurs."""
    if op.product is not None:
        return _function(op.product, a, b)
    left, right, out = _letters(op.equation)
    maps: dict[str, AxisMap] = {}
    for letters, layout in ((left, a), (right, b)):
        for letter, axis in zip(letters, layout, strict=True):
            old = maps.get(letter)
            size = axis.size if old is None else max(axis.size, old.size)
            known = [(x,) for x in (axis, old) if x is not None]
            maps[letter] = join(known, (size,))[0]
    read_a = reader(a, tuple(_at(maps[c], axis) for c, axis in zip(left, a, strict=True)))
    read_b = reader(b, tuple(_at(maps[c], axis) for c, axis in zip(right, b, strict=True)))
    gone = [c for c in dict.fromkeys(left + right) if c not in out]
    scale = math.prod(maps[c].size for c in gone if maps[c].is_collapsed)
    partial = [c for c in gone if not maps[c].is_collapsed and not maps[c].is_explicit]
    factors = [maps[c].multiplicity().double() for c in partial]
    equation = ",".join([left, right, *partial]) + "->" + out
    layout = tuple(maps[c] for c in out)
    shape = reduced_shape(layout)

    def mix(x: Tensor, y: Tensor) -> Tensor:
        extra = [factor.to(x) for factor in factors]
        result = torch.einsum(equation, read_a(x), read_b(y), *extra)
        return (result * scale if scale != 1 else result).expand(shape)

    return layout, mix


def _at(joined: AxisMap, axis: AxisMap) -> AxisMap:
    """An operand keeps an axis of size one, and a collapsed one: einsum broadcasts it."""
    return axis if axis.is_collapsed else joined


def _letters(equation: str) -> tuple[str, str, str]:
    operands, _, out = equation.partition("->")
    left, _, right = operands.partition(",")
    return left, right, out


def _function(product: Product, a: Layout, b: Layout) -> tuple[Layout, Product]:
    """Any bilinear function of two full tensors; its layout is read off a run on random integers."""
    full_a = tuple(explicit(axis.size) for axis in a)
    full_b = tuple(explicit(axis.size) for axis in b)
    read_a, read_b = reader(a, full_a), reader(b, full_b)
    generator = torch.Generator().manual_seed(0x5EED)

    def draw(layout: Layout) -> Tensor:
        return torch.randint(1, 2**20, reduced_shape(layout), generator=generator).double()

    labels = product(read_a(draw(a)), read_b(draw(b)))
    layout, _ = layout_of_labels(labels.long())
    picks = [(dim, axis.representatives()) for dim, axis in enumerate(layout) if not axis.is_explicit]

    def blend(x: Tensor, y: Tensor) -> Tensor:
        result = product(read_a(x), read_b(y))
        for dim, index in picks:
            result = result.index_select(dim, index.to(result.device))
        return result

    return layout, blend
