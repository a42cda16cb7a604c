"""Find the entries of biases, norms and tables that belong to each channel group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.channels.groups import Groups
from fxprune.graph.params import AxisUse

__all__ = ["entry_groups"]


def entry_groups(groups: Groups, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Tensor]]:
    """Return, by parameter or buffer and axis, the group that each index goes with.

    Args:
        groups: the groups of a graph.
        shapes: the shapes of the tensors that are asked for; kernels, whose rows and columns the groups hold
            already, are left out.

    Returns:
        Name -> axis -> a group's number for every index (int64), -1 for indices that stay. An axis none of
        whose indices goes is left out. An index that several groups use goes with none of them.

    >>> from fxprune.capture import capture
    >>> from fxprune.channels.groups import group_channels
    >>> from fxprune.lowering import lower
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> groups = group_channels(lower(capture(net, torch.ones(1, 2))))
    >>> entry_groups(groups, {"0.bias": (3,), "1.bias": (2,)})
    {'0.bias': {0: tensor([0, 1, 2])}}
    """
    graph = groups.graph
    values = {value.index: value.shape for op in graph.ops for value in (*op.inputs, op.output)}
    found: dict[str, list[Tensor]] = {}
    for op in graph.ops:
        for use in op.params:
            if use.name not in shapes or use.name in graph.kernels:
                continue
            shape = tuple(shapes[use.name])
            own = [
                torch.full((size,), -1) if axis is None else _along(groups, axis, values[axis.value], size)
                for axis, size in zip(use.axes, shape, strict=True)
            ]
            if use.name in found:
                own = [_agreed(old, new) for old, new in zip(found[use.name], own, strict=True)]
            found[use.name] = own
    return {
        name: {axis: numbers.clamp(min=-1) for axis, numbers in enumerate(own) if bool((numbers >= 0).any())}
        for name, own in found.items()
        if any(bool((numbers >= 0).any()) for numbers in own)
    }


UNMET = -2
"""Stands for an index that one use of a parameter does not read."""


def _agreed(old: Tensor, new: Tensor) -> Tensor:
    """The groups that two uses of a parameter agree on."""
    both = old.where(old == new, -1)
    return new.where(old == UNMET, old.where(new == UNMET, both))


def _along(groups: Groups, use: AxisUse, shape: Sequence[int], size: int) -> Tensor:
    """The groups of the indices of one axis of a parameter, by what the axis meets in a value."""
    stays = torch.full((size,), -1)
    factors = [f for f in groups.labels.values.get(use.value, ()) if set(f.axes) & set(use.axes)]
    if len(factors) != 1:
        return stays
    numbers = groups.numbers[factors[0].labels]
    for axis in range(numbers.dim()):
        if axis not in use.axes and numbers.shape[axis] > 1:
            first = numbers.narrow(axis, 0, 1)
            same = (numbers == first).all(axis, keepdim=True)
            numbers = first.where(same, -1)
    numbers = numbers.expand([shape[axis] if axis in use.axes else 1 for axis in range(len(shape))])
    order = [*use.axes, *(axis for axis in range(len(shape)) if axis not in use.axes)]
    flat = numbers.permute(order).reshape(math.prod(shape[axis] for axis in use.axes))
    if use.index is None:
        return flat if len(flat) == size else stays
    index = torch.tensor(use.index)
    met = index >= 0
    if not bool((index[met] < size).all()):
        return stays
    low = torch.full((size,), groups.count).scatter_reduce(0, index[met], flat[met], "amin")
    high = torch.full((size,), UNMET).scatter_reduce(0, index[met], flat[met], "amax")
    return high.where((low == high) | (high == UNMET), -1)
