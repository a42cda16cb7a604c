"""Follow parameters that a network joins to one operand: ``torch.cat`` and ``torch.stack`` of weights.

A product with a joined weight is one product for each part, beside each other, one after the other, or added
up; so each part is a weight of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant, Joined
from fxprune.lowering.rules.pointwise import MOVES_TYPE

__all__ = ["joined_weights"]

JOINS = {torch.cat: "cat", torch.concat: "cat", torch.concatenate: "cat", torch.stack: "stack"}


def joined_weights(
    kind: Any, args: Sequence[Any], kwargs: dict[str, Any], view: TensorFunction | None, shape: Sequence[int]
) -> Joined | None:
    """The parts of a constant that a call of ``kind`` made: of joined parameters, or of a view of such.

    ``view``: the function by which the call moves one constant. None if there are no such parts.
    """
    first = args[0] if args else kwargs.get("tensors")
    if kind in JOINS and isinstance(first, list | tuple):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        return _joined(first, dim % len(shape), JOINS[kind] == "stack")
    if not isinstance(first, Constant) or first.joined is None or view is None:
        return first.joined if isinstance(first, Constant) and kind in MOVES_TYPE else None
    return _moved(first.joined, first.shape, view, shape)


def _joined(parts: Sequence[Any], axis: int, stacked: bool) -> Joined | None:
    if sum(isinstance(part, Constant) and part.weight is not None for part in parts) < 2:
        return None
    if any(not isinstance(part, Constant) or (part.weight and part.weight.computed) for part in parts):
        return None
    whole = tuple(_along(part, axis) if stacked else part for part in parts)
    return Joined(axis, tuple(part for part in whole if part.shape[axis]))


def _along(part: Constant, axis: int) -> Constant:
    """The part with an axis of size one, along which it is stacked."""
    shape = (*part.shape[:axis], 1, *part.shape[axis:])
    return part.moved(TensorFunction.of("unsqueeze", PREVIOUS, axis), shape)


def _moved(
    joined: Joined, before: tuple[int, ...], view: TensorFunction, shape: Sequence[int]
) -> Joined | None:
    """The parts after a view of the whole, if they still lie one after the other along one axis."""
    sizes = [part.shape[joined.axis] for part in joined.parts]
    places = [1] * len(before)
    places[joined.axis] = len(sizes)
    index = torch.arange(len(sizes)).view(places).repeat_interleave(torch.tensor(sizes), joined.axis)
    seen = view(index.expand(before).contiguous())
    if tuple(seen.shape) != tuple(shape):
        return None
    for axis, size in enumerate(shape):
        order = seen.movedim(axis, 0).reshape(size, -1)
        lengths = [int((order[:, 0] == i).sum()) for i in range(len(sizes))]
        if bool((order == order[:, :1]).all()) and bool((order[:, 0].diff() >= 0).all()):
            return Joined(axis, tuple(_moved_parts(joined, sizes, view, shape, axis, lengths)))
    return None


def _moved_parts(
    joined: Joined,
    sizes: list[int],
    view: TensorFunction,
    shape: Sequence[int],
    axis: int,
    lengths: list[int],
) -> list[Constant]:
    moved = []
    for i, part in enumerate(joined.parts):
        if not lengths[i]:
            continue
        place = TensorFunction.of(among_zeros, PREVIOUS, joined.axis, sum(sizes[:i]), sum(sizes[i + 1 :]))
        cut = place.followed_by(view).then("narrow", PREVIOUS, axis, sum(lengths[:i]), lengths[i])
        moved.append(part.moved(cut, (*shape[:axis], lengths[i], *shape[axis + 1 :])))
    return moved


def among_zeros(part: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Put a part where it lies in the whole, with zeros for the others."""
    return F.pad(part, [0, 0] * (part.dim() - 1 - axis) + [before, after])
