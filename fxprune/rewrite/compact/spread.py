"""Rewrite nodes that spread entries along axes: by counts, or to the shape of another tensor."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxprune.capture.tracer.spelling import called
from fxprune.graph import ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut

__all__ = ["LIKE", "REPEATS", "set_counts", "set_sizes"]

REPEATS = {"repeat", "tile", "repeat_interleave"}
"""Operations with a count for an axis, or for each."""

LIKE = {"expand_as": "expand", "reshape_as": "reshape", "view_as": "view"}
"""Methods whose second tensor gives its shape, and the method that takes sizes."""


def set_counts(node: fx.Node, value: ir.Value, source: ir.Value | None, cut: Cut) -> None:
    """Repeat as often as what is left of ``value`` asks for; ``source``: the value that is repeated, if any.

    Raises:
        UnevenCut: a count is computed by the network, or entries of one run go and others stay.
    """
    given: Any = node.args[0]
    before = given.meta["val"].shape if source is None else cut.shape(source)
    old, new = value.shape, cut.shape(value)
    shape = [1] * (len(old) - len(before)) + list(before)
    counts, axes = _counts(node, len(old))
    changed = list(counts)
    for place, axis in enumerate(axes):
        if new[axis] != old[axis]:
            changed[place], left = divmod(new[axis], shape[axis])
            if left or not isinstance(counts[place], int):
                raise UnevenCut(f"{node.name}: repeated entries of which some go", cut.labels_of(value))
    if not axes:
        raise UnevenCut(f"{node.name}: repeated along no axis of its own", cut.labels_of(value))
    if len(node.args) == 1:
        node.kwargs = {**node.kwargs, "repeats": changed[0]}
    elif isinstance(node.args[1], (list, tuple)):
        node.args = (given, tuple(changed))
    else:
        node.args = (given, *changed, *node.args[1 + len(changed) :])


def _counts(node: fx.Node, rank: int) -> tuple[list[Any], list[int]]:
    """The counts among a node's arguments, and the axis of the result that each is for."""
    if called(node) != "repeat_interleave":
        packed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
        counts = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        return counts, list(range(rank - len(counts), rank))
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    counts = [node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")]
    return counts, [dim % rank] if isinstance(dim, int) else []


def set_sizes(node: fx.Node, value: ir.Value, other: ir.Value, cut: Cut) -> None:
    """Give ``node`` the sizes that its result keeps where the tensor that it is shaped like gets smaller."""
    wanted, given = cut.shape(value), cut.shape(other)
    if wanted == given:
        return
    sizes: list[Any] = []
    with node.graph.inserting_before(node):
        for axis, size in enumerate(wanted):
            if size != given[axis]:
                sizes.append(size)
                continue
            sizes.append(node.graph.call_method("size", (node.args[1], axis)))
            sizes[-1].meta["val"] = size
    node.target, node.args = LIKE[str(node.target)], (node.args[0], *sizes)
