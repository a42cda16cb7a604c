"""Find what norms lose with the channels that go: sums of constants, which the smaller norms add again."""

from __future__ import annotations

from torch import Tensor, fx

from fxprune.graph import ChannelGraph, ir
from fxprune.lowering.norm_statistics import counted_nodes, kind_of
from fxprune.rewrite.compact.constants import Recorded, constant_entries, is_recorded
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.statistics import give_back_counted

__all__ = ["removed_sums"]


def removed_sums(
    graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut, recorded: Recorded
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sums of what each norm loses, and of their squares; give back what is no constant."""
    sums = {}
    order = {node: place for place, node in enumerate(nodes.values())}
    for op in graph.ops:
        if not isinstance(op, ir.Norm) or not op.axes:
            continue
        value = op.inputs[0]
        shrinking = [axis for axis in op.axes if cut.kept_along(value, axis) is not None]
        if not shrinking:
            continue
        node = nodes[op.node]
        source = node.args[0] if node.args else None
        kind = kind_of(node)
        if kind == "length":
            continue  # `keep_what_counts` asks whether what goes is zero
        place = f"{op.layer or op.node}: a statistic over channels"
        if kind == "" and len(shrinking) == 1:
            counted = counted_nodes(graph, op, shrinking[0], nodes, order)
            if counted and give_back_counted(cut, value, shrinking[0], counted, recorded, place):
                continue
        axis = {"layer": len(value.shape) - 1, "group": 1, "whole": 1}.get(kind, -1)
        known = is_recorded(graph, source, value, recorded)
        if shrinking != [axis] or not known or axis in op.held:
            cut.give_back(cut.labels_of(value), place)
            continue
        assert isinstance(source, fx.Node)
        found = _removed_sum(op, axis, recorded[source.name], cut)
        if found is not None:
            sums[op.node] = found
    return sums


def _removed_sum(
    op: ir.Norm, axis: int, values: tuple[Tensor, Tensor], cut: Cut
) -> tuple[Tensor, Tensor] | None:
    """The sums of what one norm loses along ``axis``; ``None`` if nothing is left to lose."""
    value, place = op.inputs[0], f"{op.layer or op.node}: a statistic over channels"
    kept = cut.kept_along(value, axis)
    assert kept is not None
    entries, same = constant_entries(values, axis, ~kept)
    first = values[0].movedim(axis, -1)
    if axis == 1:  # images of any size: one number for all positions
        same &= (entries == entries[:, :1]).all(1)
    elif first.dim() > 2:
        same &= (first[..., ~kept] == first[:1, ..., ~kept]).flatten(0, -2).all(0)
    if not bool(same.all()):
        along = next(f.labels.flatten() for f in cut.labels.values[value.index] if f.axes == (axis,))
        cut.give_back(along[~kept][~same], place)
        kept = cut.kept_along(value, axis)
        if kept is None:
            return None
    if axis == 1:
        one = first.flatten(0, -2)[0].where(~kept, 0.0).view(op.groups, -1)
        left = kept.view(op.groups, -1).any(1)
        return one[left].sum(1, keepdim=True), one[left].square().sum(1, keepdim=True)
    rows = first[..., ~kept]
    one = rows[:1] if rows.dim() > 1 else rows
    if bool((one == one.flatten(0, -2)[:1]).all()):
        one = one.flatten(0, -2)[0]
    return one.sum(-1, keepdim=True), one.square().sum(-1, keepdim=True)
