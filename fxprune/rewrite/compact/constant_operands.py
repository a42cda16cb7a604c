"""Cut constants that code makes by itself where they meet channels of which some are gone.

A table in ``y * torch.linspace(0, 1, 12)`` is no parameter that could be sliced: its entries are picked by an
index when the graph runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxprune.capture.tracer.spelling import called
from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.constants import read_node
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.kept import Slices
from fxprune.rewrite.compact.size_arguments import is_shape
from fxprune.torch_private import pytree

__all__ = ["cut_constants"]

POINTWISE = (ir.Affine, ir.Gate, ir.Map, ir.Source, ir.Sum)
"""Ops of one entry beside another; the sources among them are constants, such as where a mask holds."""

SCATTERED = {
    f"{name}{end}"
    for name in ("index_add", "index_copy", "index_reduce", "scatter_add", "scatter_reduce", "scatter")
    for end in ("", "_")
}
"""Operations that write values into a tensor, which code may have made for that."""

BY_ENTRY = {"gather", "take_along_dim"}
"""Operations with an index for every entry of their result."""

SIZED = {"new_empty", "new_full", "new_ones", "new_zeros"}
REPEATED = {"expand", "repeat", "tile"}
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def cut_constants(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut, slices: Slices) -> None:
    """Index the constant operands of operations by entry, in place, where a channel of their result is gone.

    ``slices``: by parameter that gets smaller, what is left; a constant computed from one has its new size.
    """
    others = {op.node for op in graph.ops if not isinstance(op, POINTWISE)}
    changed = _changed(graph, gm, cut, slices)
    reads: dict[str, list[ir.Value]] = {}
    layers: dict[str, list[ir.Kernel]] = {}
    for op in graph.ops:
        reads.setdefault(op.node, []).extend(op.inputs)
        if isinstance(op, ir.Kernel) and not op.inputs[0].live:
            layers.setdefault(op.node, []).append(op)
    for node in list(gm.graph.nodes):
        for op in layers.get(node.name, ()):
            _cut_input(node, op, cut, changed)
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), RECURRENT):
            _cut_states(graph, node, cut, changed, reads.get(node.name, ()))
        value = graph.results.get(node.name)
        if _read_constant(graph, (), node) is not None:
            continue  # whoever reads it picks entries
        calls = node.op in ("call_function", "call_method")
        if calls and node.name in others:
            _cut_states(graph, node, cut, changed, reads.get(node.name, ()))
        if not calls or (node.name in others and called(node) not in SCATTERED | BY_ENTRY):
            continue
        if not isinstance(value, ir.Value) or not value.live:  # zeros, times what is followed
            value = _followed_operand(graph, node)
        if value is None or not cut.touches(value):
            continue
        for source in node.all_input_nodes:
            own = graph.results.get(source.name)
            if source not in changed and not (isinstance(own, ir.Value) and own.live):
                _read_picked(node, source, _picked(node, source, value, cut), changed)
    gm.recompile()


def _read_picked(node: fx.Node, source: fx.Node, picked: fx.Node, changed: set[fx.Node]) -> None:
    """Let a node read what was picked of a constant; where it writes into that, all after it read it, too."""
    name = called(node)
    writes = node.target is operator.setitem or (name.endswith("_") and not name.endswith("__"))
    if picked is not source and writes and node.args[0] is source:
        order = {each: place for place, each in enumerate(node.graph.nodes)}
        first = order[node]
        source.replace_all_uses_with(picked, delete_user_cb=lambda user: order[user] >= first)
        changed.add(picked)
    else:
        node.replace_input_with(source, picked)


def _followed_operand(graph: ChannelGraph, node: fx.Node) -> ir.Value | None:
    """An operand on a path, of the shape of the node's result."""
    result = node.meta.get("val")
    for source in node.all_input_nodes:
        value = graph.results.get(source.name)
        if isinstance(value, ir.Value) and value.live and isinstance(result, Tensor):
            if value.shape == tuple(result.shape):
                return value
    return None


def _cut_states(
    graph: ChannelGraph, node: fx.Node, cut: Cut, changed: set[fx.Node], reads: Sequence[ir.Value]
) -> None:
    """Index what code has made for a node that moves it, or for the first states of a recurrent layer."""
    for source in node.all_input_nodes:
        own = None if source in changed else _read_constant(graph, reads, source)
        if own is not None and cut.touches(own):
            _read_picked(node, source, _picked(node, source, own, cut), changed)


def _cut_input(node: fx.Node, op: ir.Kernel, cut: Cut, changed: set[fx.Node]) -> None:
    """Index what code has made for a layer to read, such as the first state of a loop, by what stays."""
    value, columns = op.inputs[0], cut.sides_of(op).columns
    source, gone = read_node(cut.graph, node, value), cut.is_gone(columns)
    if not isinstance(source, fx.Node) or source in changed or not bool(gone.any()):
        return
    axis, val = len(value.shape) - 1 - (0 if op.window is None else len(op.window.kernel)), source.meta["val"]
    if (
        op.groups > 1
        or not isinstance(val, Tensor)
        or val.shape != value.shape
        or len(columns) != val.shape[axis]
    ):
        return
    index: Any = (*(slice(None),) * axis, (~gone).nonzero().flatten().tolist())
    with node.graph.inserting_before(node):
        picked = node.graph.create_node("call_function", operator.getitem, (source, index))
    _read_picked(node, source, picked, changed)


def _read_constant(graph: ChannelGraph, reads: Sequence[ir.Value], source: fx.Node) -> ir.Value | None:
    """The constant among ``reads`` that ``source`` gives: each reader may need other entries of it."""
    known = graph.results.get(source.name)
    for value in (*reads, known):
        if not isinstance(value, ir.Value):
            continue
        maker = graph.op_of(value)
        if isinstance(maker, ir.Source) and maker.node == source.name and not value.live:
            return value
    return None


def _picked(node: fx.Node, source: fx.Node, value: ir.Value, cut: Cut) -> fx.Node:
    """The entries of ``source`` that meet what is left of ``value``, read before ``node``."""
    val = source.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() > len(value.shape):
        return source
    first, picked = len(value.shape) - val.dim(), source
    for axis, size in enumerate(val.shape):
        kept = cut.kept_along(value, first + axis)
        if kept is None or not size == value.shape[first + axis] > 1:
            continue
        index: Any = (*(slice(None),) * axis, kept.nonzero().flatten().tolist())
        with node.graph.inserting_before(node):
            picked = node.graph.create_node(
                "call_function", operator.getitem, (picked, index), {}, name=f"narrowed_{node.name}"
            )
    return picked


def _changed(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut, slices: Slices) -> set[fx.Node]:
    """The nodes whose shapes follow from what is cut: parameters, values, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        value = graph.results.get(node.name)
        own = node.op == "get_attr" and str(node.target) in slices
        own |= node.op == "call_module" and any(name.startswith(f"{node.target}.") for name in slices)
        if isinstance(value, ir.Value) and cut.touches(value):
            maker = graph.op_of(value)
            own |= not isinstance(maker, ir.Source) or bool(maker.params)
        yields = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))
        yields = yields and not _has_sizes_of_its_own(node)
        if own or (yields and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _has_sizes_of_its_own(node: fx.Node) -> bool:
    """Whether a node makes a tensor of sizes that are numbers now, also where they were read off another.

    An index that is repeated along channels is such, whatever it was computed from.
    """
    if called(node) in REPEATED:
        val, sizes = node.meta.get("val"), pytree.tree_leaves(node.args[1:])
        is_index = isinstance(val, Tensor) and not (val.is_floating_point() or val.is_complex())
        return is_index and any(isinstance(size, int) and size > 1 for size in sizes)
    return called(node) in SIZED and not any(is_shape(leaf) for leaf in pytree.tree_leaves(node.args))
