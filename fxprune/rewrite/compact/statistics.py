"""Find the nodes of norms written by hand that add up channels, and what these hold of channels that go.

Where all that is added up is zero in the channels that go, sums stay what they are, and means need a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.constants import Recorded
from fxprune.rewrite.compact.cut import Cut

__all__ = [
    "PAIRS", "POINTWISE", "REDUCTIONS", "SPREADS", "centre_of", "correction_of", "counted_node", "dims_of",
    "give_back_counted", "keep_what_statistics_count", "name_of", "reduced_axes", "reductions",
]  # fmt: skip

PAIRS = frozenset(("var_mean", "std_mean"))
SPREADS = PAIRS | {"var", "std"}
REDUCTIONS = SPREADS | {"mean", "sum", "norm", "vector_norm"}
POINTWISE = frozenset(
    (
        "add", "sub", "rsub", "mul", "truediv", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg",
        "abs", "clamp", "clamp_min", "maximum", "minimum", "float", "double", "to", "type_as", "contiguous",
        "multiply",
    )
)  # fmt: skip


def reductions(
    graph: ChannelGraph, op: ir.Norm, nodes: Mapping[str, fx.Node], axis: int
) -> list[fx.Node] | None:
    """Return the nodes between what ``op`` reads and its own that add up entries along ``axis``.

    Where it reads what was already divided or scaled, statistics may be of what was there before: these
    are looked for step by step. ``None`` if a node between the two is of a kind that is not known here, or
    has other axes.
    """
    value = op.inputs[0]
    while True:
        found = _reductions_of(graph, op, value, nodes, axis)
        maker = graph.op_of(value)
        if found != [] or not isinstance(maker, (ir.Affine, ir.Norm)) or not maker.inputs:
            return found
        before = maker.inputs[0]
        if len(before.shape) != len(value.shape) or before.shape[axis] != value.shape[axis]:
            return found
        value = before


def _reductions_of(
    graph: ChannelGraph, op: ir.Norm, value: ir.Value, nodes: Mapping[str, fx.Node], axis: int
) -> list[fx.Node] | None:
    """The nodes between what yields ``value`` and the node of ``op`` that add up entries along ``axis``."""
    node = nodes[op.node]
    order = {each: place for place, each in enumerate(node.graph.nodes)}
    names = [output.node for output in graph.nodes_of(value) if not output.path]
    before = [nodes[name] for name in names if name in nodes and order[nodes[name]] < order[node]]
    if not before:
        return None
    source = max(before, key=order.__getitem__)  # an activation yields the value that it reads
    between: list[fx.Node] = []
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        between.append(each)
        for near in each.all_input_nodes:
            if near not in seen and near is not source and order[near] > order[source]:
                seen.add(near)
                waiting.append(near)
    depends = {source}
    found = []
    for each in sorted(between, key=order.__getitem__):
        if not depends & set(each.all_input_nodes):
            continue
        depends.add(each)
        name = name_of(each)
        part = name == "getitem" and name_of(each.all_input_nodes[0]) in PAIRS
        if each.op == "call_module" or not (name in REDUCTIONS | POINTWISE or part):
            return None
        if _rank(each) != _rank(source):
            return None
        if name in REDUCTIONS:
            summed = counted_node(each, axis)
            if summed is None:
                return None
            if _tensor(each.all_input_nodes[0]).shape[axis] != _tensor(each).shape[axis]:
                found.append(each)
    return found


def counted_node(node: fx.Node, axis: int) -> fx.Node | None:
    """Return the node whose entries must be zero for what goes to be known to the reduction ``node``.

    That is what the reduction reads; of a square of what is left of a mean, that before the mean is
    subtracted. ``None`` where the reduction cannot make up for what goes.
    """
    if name_of(node) in SPREADS:
        return node.all_input_nodes[0] if _is_plain_spread(node, axis) else None
    centre = centre_of(node, axis)
    return centre[0] if centre is not None else node.all_input_nodes[0]


def centre_of(node: fx.Node, axis: int) -> tuple[fx.Node, fx.Node] | None:
    """Return what a mean of squares is the spread of, and the number that is subtracted from it.

    The second has one entry for all that the reduction adds up. ``None`` for means of other things.
    """
    square = node.all_input_nodes[0]
    name, sources = name_of(square), square.all_input_nodes
    squares = (name == "pow" and square.args[1:] in ((2,), (2.0,))) or name == "square"
    squares |= name in ("mul", "multiply") and square.args[0] is square.args[1]
    if name_of(node) != "mean" or not squares or len(sources) != 1 or name_of(sources[0]) != "sub":
        return None
    wide, one = (sources[0].args[:2]) if len(sources[0].args) > 1 else (None, None)
    if not isinstance(wide, fx.Node) or not isinstance(one, fx.Node) or sources[0].kwargs:
        return None
    shapes = [_tensor(each).shape for each in (square, node, one)]
    if any(len(shape) != len(shapes[0]) for shape in shapes) or shapes[2][axis] != 1:
        return None
    summed = [place for place, (a, b) in enumerate(zip(*shapes[:2], strict=True)) if a != b]
    return (wide, one) if all(shapes[2][place] == 1 for place in summed) else None


def _is_plain_spread(node: fx.Node, axis: int) -> bool:
    """Whether a variance or the like is along ``axis`` alone, or counts its entries as they are."""
    shape, result = _tensor(node.all_input_nodes[0]).shape, _tensor(node).shape
    if len(shape) != len(result):
        return False
    others = [
        place for place, (a, b) in enumerate(zip(shape, result, strict=True)) if a != b and place != axis
    ]
    return not others or correction_of(node) == 0


def dims_of(node: fx.Node) -> Any:
    """Return the dimensions that a mean, a variance or the like was called with; None for all."""
    given = [x for x in node.args[1:] if not isinstance(x, bool)]
    return node.kwargs.get("dim", node.kwargs.get("axis", given[0] if given else None))


def reduced_axes(node: fx.Node) -> set[int]:
    """Return the axes that a reduction may add up: all, where its arguments do not tell."""
    shape, result = _tensor(node.all_input_nodes[0]).shape, _tensor(node).shape
    if len(shape) == len(result):
        return {axis for axis, (a, b) in enumerate(zip(shape, result, strict=True)) if a != b}
    dims = dims_of(node) if name_of(node) in SPREADS | {"mean"} else None
    if dims is None or dims == () or dims == []:
        return set(range(len(shape)))
    return {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}


def correction_of(node: fx.Node) -> float:
    """Return what a variance subtracts from the number of its entries."""
    given = [x for x in node.args[1:] if isinstance(x, bool)]
    if "correction" in node.kwargs:
        number = node.kwargs["correction"]
        return 1.0 if number is None else float(number)  # type: ignore[arg-type]
    return float(bool(node.kwargs.get("unbiased", given[0] if given else True)))


def keep_what_statistics_count(
    graph: ChannelGraph, op: ir.Norm, axis: int, nodes: Mapping[str, fx.Node], cut: Cut, recorded: Recorded
) -> bool:
    """Give back the channels that a norm counts though they go; False if that cannot be told."""
    value = op.inputs[0]
    found = reductions(graph, op, nodes, axis)
    if not found:
        return False
    counted = [counted_node(node, axis) for node in found]
    place = f"{op.layer or op.node}: a statistic over channels"
    return give_back_counted(cut, value, axis, counted, recorded, place)


def give_back_counted(
    cut: Cut, value: ir.Value, axis: int, nodes: Iterable[fx.Node | None], recorded: Recorded, place: str
) -> bool:
    """Give back the channels of ``value`` along ``axis`` that are not zero in one of ``nodes``.

    False, and nothing is given back, where that cannot be told.
    """
    along = [factor for factor in cut.labels.values.get(value.index, ()) if axis in factor.axes]
    if len(along) != 1:
        return False
    labels = along[0].labels  # along heads, too, where the axis is that of the channels of one
    gone = cut.is_gone(labels)
    hot_ones = torch.zeros_like(gone)
    others = [dim for dim in range(gone.dim()) if dim not in along[0].axes]
    for node in nodes:
        for run in (recorded.get(node.name, ()) if node is not None else ()) or (None,):
            if run is None or run.dim() != gone.dim():
                return False
            hot = (run != 0) & gone
            hot_ones |= hot.amax(others, keepdim=True) if others else hot
    if bool(hot_ones.any()):
        cut.give_back(labels[hot_ones], place)
    return True


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _tensor(node: fx.Node) -> Tensor:
    """The tensor that a node yields, on the meta device; the first of a pair."""
    val = node.meta["val"]
    found: Tensor = val[0] if isinstance(val, (tuple, list)) else val
    return found


def _rank(node: fx.Node) -> int:
    val = node.meta.get("val")
    val = val[0] if isinstance(val, (tuple, list)) and val else val
    return val.dim() if isinstance(val, Tensor) else -1
