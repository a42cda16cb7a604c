"""Find the nodes of norms that add up entries, and say of which norms no entry can be dropped.

Where all that is added up is zero in the entries that go, sums stay what they are, and means need a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.capture.narrowed_norms import NarrowedGroupNorm, NarrowedLayerNorm, NarrowedRMSNorm
from fxprune.graph import ChannelGraph, ir

__all__ = [
    "GROUP_NORMS",
    "LAYER_NORMS",
    "PAIRS",
    "POINTWISE",
    "REDUCTIONS",
    "RMS_NORMS",
    "SPREADS",
    "centre_of",
    "correction_of",
    "counted_node",
    "counted_nodes",
    "dims_of",
    "hold_unknown_statistics",
    "kind_of",
    "name_of",
    "reduced_axes",
    "reductions",
]  # fmt: skip

PAIRS = frozenset(("var_mean", "std_mean"))
SPREADS = PAIRS | {"var", "std"}
LENGTHS = frozenset(("norm", "vector_norm", "linalg_norm", "linalg_vector_norm"))
REDUCTIONS = SPREADS | LENGTHS | {"mean", "sum"}
LAYER_NORMS = (F.layer_norm, torch.layer_norm)
RMS_NORMS = (F.rms_norm, torch.rms_norm)
GROUP_NORMS = (F.group_norm, torch.group_norm)
POINTWISE = frozenset(
    (
        "add", "sub", "rsub", "mul", "truediv", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg",
        "abs", "clamp", "clamp_min", "maximum", "minimum", "float", "double", "to", "type_as", "contiguous",
        "multiply",
    )
)  # fmt: skip


def kind_of(node: fx.Node) -> str:
    """Return "layer" (also for RMS norms) or "group" for a node that can be narrowed, "" for any other.

    "whole": a layer norm over several axes, which is a group norm of one group but for its weights. "length":
    what a node divides by loses nothing with entries that are zero.
    """
    if node.target is F.normalize:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 2.0)
        return "length" if isinstance(p, (int, float)) and p > 0 else ""
    if node.target is F.cosine_similarity:
        return "length"
    module: object = node.target
    if node.op == "call_module" and isinstance(node.graph.owning_module, nn.Module):
        module = node.graph.owning_module.get_submodule(str(node.target))
    if isinstance(module, nn.CosineSimilarity):
        return "length"
    if isinstance(module, (NarrowedLayerNorm, NarrowedRMSNorm)):
        return "layer"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or module in LAYER_NORMS + RMS_NORMS:
        return _kind_by_axes(node, module)
    if isinstance(module, (nn.GroupNorm, NarrowedGroupNorm)) or module in GROUP_NORMS:
        return "group"
    return ""


def _kind_by_axes(node: fx.Node, module: Any) -> str:
    """Tell a layer norm over the last axis from one over several."""
    called = not isinstance(module, nn.Module)
    given = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ()) if called else ()
    shape: Any = given if called else module.normalized_shape
    if len(shape) == 1:
        return "layer"
    return "" if isinstance(module, nn.RMSNorm) or module in RMS_NORMS else "whole"


def hold_unknown_statistics(graph: ChannelGraph, gm: fx.GraphModule) -> ChannelGraph:
    """Return the graph with norms that name the axes of which no entry can be dropped.

    A statistic along such an axis is computed in a way that no smaller norm is known for: of neighbours, of
    several axes at once, or by code that adds up entries in other ways than `reductions` knows. Norms inside
    of a module that is called as a whole are not looked at: compaction takes it apart, and asks again.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    held = {}
    for place, op in enumerate(graph.ops):
        if isinstance(op, ir.Norm) and op.axes and not op.inner:
            if axes := _held_axes(graph, op, nodes, order):
                held[place] = replace(op, held=axes)
    ops = tuple(held.get(place, op) for place, op in enumerate(graph.ops))
    return replace(graph, ops=ops) if held else graph


def _held_axes(
    graph: ChannelGraph, op: ir.Norm, nodes: Mapping[str, fx.Node], order: Mapping[fx.Node, int]
) -> tuple[int, ...]:
    kind, rank = kind_of(nodes[op.node]), len(op.inputs[0].shape)
    match kind:
        case "length":
            return ()
        case "group":
            return tuple(axis for axis in op.axes if axis != 1)
        case "layer":
            return ()
        case "whole":
            is_images = rank > 2 and op.axes == tuple(range(1, rank))
            return tuple(axis for axis in op.axes if axis != 1) if is_images else op.axes
        case _:
            return tuple(axis for axis in op.axes if not reductions(graph, op, axis, nodes, order))


def reductions(
    graph: ChannelGraph,
    op: ir.Norm,
    axis: int,
    nodes: Mapping[str, fx.Node],
    order: Mapping[fx.Node, int],
) -> list[fx.Node] | None:
    """Return the nodes between what ``op`` reads and its own that add up entries along ``axis``.

    ``nodes``: by name; ``order``: their places. Where the norm reads what was already divided or scaled,
    statistics may be of what was there before: these are looked for step by step. ``None`` if a node between
    the two is of a kind that is not known here, or has other axes.
    """
    value = op.inputs[0]
    while True:
        found = _reductions_of(graph, op, value, axis, nodes, order)
        maker = graph.op_of(value)
        if found != [] or not isinstance(maker, (ir.Affine, ir.Norm)) or not maker.inputs:
            return found
        before = maker.inputs[0]
        if len(before.shape) != len(value.shape) or before.shape[axis] != value.shape[axis]:
            return found
        value = before


def _reductions_of(
    graph: ChannelGraph,
    op: ir.Norm,
    value: ir.Value,
    axis: int,
    nodes: Mapping[str, fx.Node],
    order: Mapping[fx.Node, int],
) -> list[fx.Node] | None:
    """The nodes between what yields ``value`` and the node of ``op`` that add up entries along ``axis``."""
    node = nodes[op.node]
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
    depends, reduced = {source}, set[fx.Node]()
    found = []
    for each in sorted(between, key=order.__getitem__):
        read = depends & set(each.all_input_nodes)
        if not read or _is_size(each):
            continue
        depends.add(each)
        if read <= reduced:  # whatever is computed of sums alone stays what it is
            reduced.add(each)
            continue
        if each.op == "call_module" or _rank(each.all_input_nodes[0]) != _rank(source):
            return None
        if name_of(each) in REDUCTIONS:
            if counted_node(each, axis) is None:
                return None
            if axis in reduced_axes(each):
                found.append(each)
                reduced.add(each)
                continue
        if name_of(each) not in REDUCTIONS | POINTWISE or _rank(each) != _rank(source):
            return None
    return found


def counted_nodes(
    graph: ChannelGraph,
    op: ir.Norm,
    axis: int,
    nodes: Mapping[str, fx.Node],
    order: Mapping[fx.Node, int],
) -> list[fx.Node | None]:
    """Return the nodes whose entries must be zero for what goes along ``axis`` to be known to a norm."""
    return [counted_node(node, axis) for node in reductions(graph, op, axis, nodes, order) or ()]


def counted_node(node: fx.Node, axis: int) -> fx.Node | None:
    """Return the node whose entries must be zero for what goes to be known to the reduction ``node``.

    That is what the reduction reads; of a square of what is left of a mean, that before the mean is
    subtracted. ``None`` where the reduction cannot make up for what goes.
    """
    if name_of(node) in LENGTHS and not _counts_no_zero(node):
        return None
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


def _counts_no_zero(node: fx.Node) -> bool:
    """Whether a length stays what it is without entries that are zero; not with a negative order."""
    given = node.args[1] if len(node.args) > 1 else None
    order = node.kwargs.get("p", node.kwargs.get("ord", given))
    return order in (None, "fro", "nuc") or (isinstance(order, (int, float)) and order >= 0)


def _is_size(node: fx.Node) -> bool:
    """Whether a node yields a number that is read off a shape: smaller networks keep what it was."""
    val = node.meta.get("val")
    return isinstance(val, (int, float, torch.Size)) and not isinstance(val, bool)


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
    dims = dims_of(node) if name_of(node) in SPREADS | {"mean", "sum"} else None
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
