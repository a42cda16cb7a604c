"""Tell which weights that code computes from a parameter can be cut with it, as rows of length one can.

A channel of the parameter that is zero may be none of the weight, and a smaller parameter may give another
weight: standardised rows are such. Lengths of rows do not change with zeros that are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.inside import weight_inside
from fxprune.rewrite.compact.parameter_views import constant_nodes
from fxprune.rewrite.compact.trial import RUN_ERRORS, difference

__all__ = ["computed_weights", "give_back_computed"]

TOLERANCE = 1e-6
"""How far a weight may be from what is left of it before, over its largest entry."""


def computed_weights(graph: ChannelGraph, gm: fx.GraphModule) -> set[str]:
    """Return the parameters that some layer reads otherwise than as they are, so that zeros tell nothing.

    Those whose zeros are zeros of the weight as well are left out.
    """
    return {
        str(op.weight.name)
        for op in _computed(graph)
        if not op.weight.scaled and not _keeps_zeros(gm, op, str(op.weight.name))
    }


def give_back_computed(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut, opaque: Collection[str]) -> None:
    """Give back channels of parameters of which what is left would make another weight.

    ``opaque``: those that `computed_weights` returned, if masks of the parameters say what counts.
    """
    computed = {str(op.weight.name) for op in _computed(graph) if not op.weight.scaled}
    for sides in cut.labels.sides:
        name, op = str(sides.name), graph.ops[sides.op]
        if name not in computed or not isinstance(op, ir.Kernel):
            continue
        rows, columns = ~cut.is_gone(sides.rows), ~cut.is_gone(sides.columns)
        if name in opaque or not _is_cut_alike(gm, op, name, rows, columns):
            labels = torch.cat([sides.rows, sides.columns])
            cut.give_back(labels, f"{name}: the layer computes its weight from all of it")


def _computed(graph: ChannelGraph) -> Iterator[ir.Kernel]:
    """The layers whose weight is computed from a parameter."""
    for op in graph.ops:
        if isinstance(op, ir.Kernel) and op.weight.computed and op.weight.name is not None:
            yield op


def _keeps_zeros(gm: fx.GraphModule, op: ir.Kernel, name: str) -> bool:
    """Whether the weight of a layer is zero wherever the parameter is."""
    own = gm.get_parameter(name).detach()
    weight = _weight(gm, op, name, own)
    return weight is not None and weight.shape == own.shape and not bool(weight[own == 0].any())


def _is_cut_alike(gm: fx.GraphModule, op: ir.Kernel, name: str, rows: Tensor, columns: Tensor) -> bool:
    """Whether what is left of a parameter gives what is left of the weight."""
    own = gm.get_parameter(name).detach()
    if own.shape[:2] != (len(rows), len(columns)):
        return False
    before = _weight(gm, op, name, own)
    after = _weight(gm, op, name, own[rows][:, columns])
    if before is None or after is None or before.shape != own.shape:
        return False
    left = before[rows][:, columns]
    return after.shape == left.shape and difference(left, after) <= TOLERANCE


def _weight(gm: fx.GraphModule, op: ir.Kernel, name: str, parameter: Tensor) -> Tensor | None:
    """Compute the weight that a layer reads with these numbers in its parameter; None if no node gives it."""
    calls = [node for node in gm.graph.nodes if node.name == op.node and node.op == "call_module"]
    if calls:
        return weight_inside(gm, calls[0], name, parameter)
    constant = set(constant_nodes(gm))
    read = [node for reader in gm.graph.nodes if reader.name == op.node for node in reader.all_input_nodes]
    known = {node: _made_of(node, name) for node in read if node in constant}
    operands = [node for node, found in known.items() if found]
    if len(operands) != 1:
        return None
    runner, values = fx.Interpreter(gm), dict[fx.Node, Any]()
    try:
        with torch.no_grad():
            for node in known[operands[0]]:
                if node.op == "get_attr":
                    values[node] = parameter if node.target == name else runner.fetch_attr(str(node.target))
                else:
                    args, kwargs = (fx.node.map_arg(x, values.__getitem__) for x in (node.args, node.kwargs))
                    values[node] = getattr(runner, node.op)(node.target, args, kwargs)
    except RUN_ERRORS:
        return None
    result = values[operands[0]]
    return result if isinstance(result, Tensor) else None


def _made_of(node: fx.Node, name: str) -> list[fx.Node]:
    """All that a node is computed from and itself, in order; empty if the parameter is not among it."""
    found, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    reads = any(each.op == "get_attr" and each.target == name for each in found)
    return [each for each in node.graph.nodes if each in found] if reads else []
