"""Find the numbers among a node's arguments that depend on the sizes of axes.

In: an fx node that moves data. Out: a :class:`SizeLiteral` for each number that the node itself holds; sizes
that other nodes compute (``x.shape[1] // 2``) are no literals of this node.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.tracer.spelling import called
from fxprune.graph.literals import Role, SizeLiteral

__all__ = ["literals_of"]

Place = tuple[int | str, ...]

SIZES = {"view": "size", "reshape": "shape", "expand": "size", "broadcast_to": "size"}
"""Operations that take the output's sizes, and the name of that argument."""
SPLITS = {"split": ("split_size_or_sections", "split_size"), "split_with_sizes": ("split_sizes",)}
"""Operations that take the size of every part, and the names of that argument."""


def literals_of(
    node: fx.Node, module: nn.Module | None, rank: int, part: int | None
) -> Iterator[SizeLiteral]:
    """Yield the literals of view, reshape, expand, broadcast_to, unflatten, split, chunk, narrow, select, and
    of indexing.

    Args:
        node: of the call.
        module: that a ``call_module`` calls.
        rank: of the first operand.
        part: which of several results is meant.
    """
    if isinstance(module, nn.Unflatten):
        if isinstance(module.dim, int):
            yield from _sizes(("unflattened_size",), module.unflattened_size, module.dim % rank)
        return
    target = node.target
    if target in (operator.getitem, operator.setitem):
        yield from _indices(node.args[1], rank)
        return
    name = called(node)
    if name in SIZES:
        yield from _given_sizes(node, SIZES[name])
    elif name == "unflatten":
        place, sizes = _argument(node, 2, "sizes", "unflattened_size")
        yield from _sizes(place, sizes, _axis(node, 1, rank))
    elif name in SPLITS:
        place, sizes = _argument(node, 1, *SPLITS[name])
        axis = _axis(node, 2, rank)
        if isinstance(sizes, (list, tuple)) and part is not None:
            place, sizes = (*place, part), sizes[part]
        yield from _number(place, sizes, "size", "output", axis)
    elif name == "chunk":
        yield from _number(*_argument(node, 1, "chunks"), "parts", "input", _axis(node, 2, rank))
    elif name == "narrow":
        axis = _axis(node, 1, rank)
        yield from _number(*_argument(node, 2, "start"), "start", "input", axis)
        yield from _number(*_argument(node, 3, "length"), "size", "output", axis)
    elif name == "select":
        yield from _number(*_argument(node, 2, "index"), "index", "input", _axis(node, 1, rank))


def _given_sizes(node: fx.Node, keyword: str) -> Iterator[SizeLiteral]:
    """Sizes of all output axes, as one sequence or one by one."""
    place, given = _argument(node, 1, keyword, "shape")
    if isinstance(given, (list, tuple)):
        yield from _sizes(place, given, 0)
        return
    for axis, size in enumerate(node.args[1:]):
        yield from _number((axis + 1,), size, "size", "output", axis)


def _sizes(place: Place, sizes: Any, first: int) -> Iterator[SizeLiteral]:
    """A sequence of the sizes of output axes from ``first`` on."""
    if isinstance(sizes, (list, tuple)):
        for i, size in enumerate(sizes):
            yield from _number((*place, i), size, "size", "output", first + i)


def _indices(given: Any, rank: int) -> Iterator[SizeLiteral]:
    """The bounds and positions in ``x[given]``."""
    items = given if isinstance(given, tuple) else (given,)
    places: list[Place] = [(1, i) for i in range(len(items))] if isinstance(given, tuple) else [(1,)]
    axis = 0
    for place, item in zip(places, items, strict=True):
        if item is Ellipsis:
            axis = rank - sum(map(_axes_taken, items)) + axis
            continue
        if isinstance(item, slice):
            yield from _number((*place, "start"), item.start, "start", "input", axis)
            yield from _number((*place, "stop"), item.stop, "stop", "input", axis)
        elif isinstance(item, (list, tuple)):
            for i, number in enumerate(item):
                yield from _number((*place, i), number, "index", "input", axis)
        else:
            yield from _number(place, item, "index", "input", axis)
        axis += _axes_taken(item)


def _axes_taken(item: Any) -> int:
    """Count the axes of a tensor that one item of an index stands for."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    val = item.meta.get("val") if isinstance(item, fx.Node) else None
    return val.dim() if isinstance(val, Tensor) and val.dtype == torch.bool else 1


def _argument(node: fx.Node, position: int, *names: str) -> tuple[Place, Any]:
    """The place of an argument that is given by position or under one of ``names``, and the argument."""
    if position < len(node.args):
        return (position,), node.args[position]
    for name in names:
        if name in node.kwargs:
            return (name,), node.kwargs[name]
    return (), None


def _axis(node: fx.Node, position: int, rank: int) -> int:
    dim = _argument(node, position, "dim")[1]
    return dim % rank if isinstance(dim, int) else 0


def _number(place: Place, x: Any, role: Role, side: Any, axis: int) -> Iterator[SizeLiteral]:
    """``x``, if it is a number that depends on a size: not a size left open, not a start at zero."""
    if not isinstance(x, int) or isinstance(x, bool) or (role, x) in (("size", -1), ("start", 0)):
        return
    yield SizeLiteral(place, x, role, side, axis)
