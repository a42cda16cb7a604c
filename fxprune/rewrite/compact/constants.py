"""Find what removed channels still contribute, and move it into the biases of the layers that read them.

A channel that no path reaches may still carry a constant: the bias of a pruned output. Two runs on different
inputs give the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.tracer.spelling import changes_input
from fxprune.channels.by_channel import labels_by_weight
from fxprune.channels.labels import Sides
from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.parts import zero_in_parts
from fxprune.rewrite.compact.unchecked import Unchecked
from fxprune.torch_private import ConvNd

__all__ = ["Dense", "Recorded", "constant_entries", "fold", "is_recorded", "read_node", "record"]

Recorded = dict[str, tuple[Tensor, Tensor]]
"""By the name of a node: its output in two runs."""


class _NodeValues(Unchecked):
    def __init__(self, gm: fx.GraphModule, wanted: set[str], seed: int) -> None:
        super().__init__(gm, seed)
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted and n.target is operator.setitem and isinstance(n.args[0], fx.Node):
            result = self.env[n.args[0]]
        if n.name in self.wanted and isinstance(result, Tensor):
            # A copy: operations in place may change it before the next run.
            self.found[n.name] = result.detach().cpu().clone()
        return result


@dataclass(frozen=True)
class Dense:
    """Two runs of the network before: the numbers of some nodes, and its outputs."""

    recorded: Recorded
    outputs: tuple[Any, Any]


def record(gm: fx.GraphModule, inputs: tuple[tuple[Any, ...], tuple[Any, ...]], wanted: set[str]) -> Dense:
    """Run the network on two inputs, each with its own random numbers; keep outputs and ``wanted`` nodes."""
    runs, outputs = [], []
    with torch.no_grad():
        for seed, args in enumerate(inputs):
            recorder = _NodeValues(gm, wanted, seed)
            outputs.append(recorder.run(*args))
            runs.append(recorder.found)
    return Dense({name: (runs[0][name], runs[1][name]) for name in runs[0]}, (outputs[0], outputs[1]))


def constant_entries(values: tuple[Tensor, Tensor], axis: int, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the removed entries along ``axis``, (removed, all else), and which are equal in both runs."""
    first, second = (value.movedim(axis, 0)[gone].unsqueeze(-1).flatten(1) for value in values)
    if first.shape != second.shape:  # sequences of other lengths
        even = (first == first[:, :1]).all(1) & (second == first[:, :1]).all(1)
        return first, even
    return first, (first == second).all(1)


def is_recorded(graph: ChannelGraph, source: Any, value: ir.Value, recorded: Recorded) -> bool:
    """Whether the numbers of ``value`` are those recorded of the node ``source``."""
    return isinstance(source, fx.Node) and source.name in recorded and _yields(graph, source, value)


def read_node(graph: ChannelGraph, node: fx.Node, value: ir.Value) -> Any:
    """Return the argument of a node that yields ``value``, wherever it stands: behind an equation, say.

    Where an argument was written into since, the node that wrote ``value`` is returned.
    """
    given = next((each for each in node.all_input_nodes if _yields(graph, each, value)), None)
    if given is None and (names := {output.node for output in graph.nodes_of(value) if not output.path}):
        writers = (each for each in node.graph.nodes if each.name in names and changes_input(each))
        given = next((each for each in writers if each.args and each.args[0] in node.all_input_nodes), None)
    return given if given is not None or not node.args else node.args[0]


def _yields(graph: ChannelGraph, node: fx.Node, value: ir.Value) -> bool:
    found = graph.results.get(node.name)
    return isinstance(found, ir.Value) and found.index == value.index


def fold(
    graph: ChannelGraph, gm: fx.GraphModule, cut: Cut, recorded: Recorded, *, fold_constants: bool
) -> dict[str, Tensor]:
    """Return what to add to the bias of each layer, by the layer's path; give back what cannot be folded."""
    added: dict[str, Tensor] = {}
    nodes = {node.name: node for node in gm.graph.nodes}
    calls: dict[int, list[ir.Kernel]] = {}
    for op in graph.ops:
        if isinstance(op, ir.Kernel) and nodes.get(op.node) is not None:
            module = _module(gm, nodes[op.node])
            shared = (
                op if module is None else module if getattr(module, "bias", None) is None else module.bias
            )
            calls.setdefault(id(shared), []).append(op)
    for ops in calls.values():
        found = _contributions(gm, ops, nodes, cut, recorded, fold_constants)
        if any(not _alike(found[0], each) for each in found[1:]):
            # One bias cannot take what differs from call to call.
            found = _contributions(gm, ops, nodes, cut, recorded, False)
        for op, extra in zip(ops, found, strict=True):
            if extra is not None and bool((extra != 0).any()):
                added[str(nodes[op.node].target)] = extra
    return added


def _contributions(
    gm: fx.GraphModule,
    ops: Sequence[ir.Kernel],
    nodes: Mapping[str, fx.Node],
    cut: Cut,
    recorded: Recorded,
    fold_constants: bool,
) -> list[Tensor | None]:
    """Return what removed inputs add to each of some layers with one bias, see `_contribution`."""
    return [
        _contribution(op, _module(gm, nodes[op.node]), nodes[op.node], cut, recorded, fold_constants)
        if cut.touches(op.inputs[0])
        else None
        for op in ops
    ]


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two contributions are the same; none is one of zeros."""
    if one is None or other is None:
        return all(each is None or not bool((each != 0).any()) for each in (one, other))
    return torch.equal(one, other)


def _module(gm: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _contribution(
    op: ir.Kernel,
    module: nn.Module | None,
    node: fx.Node,
    cut: Cut,
    recorded: Recorded,
    fold_constants: bool,
) -> Tensor | None:
    """The constant that removed input channels add to each output channel of a layer."""
    value = op.inputs[0]
    windows = 0 if op.window is None else len(op.window.kernel)
    axis = len(value.shape) - 1 - windows
    sides = cut.sides_of(op)
    gone = cut.is_gone(sides.columns)
    if not bool(gone.any()) or op.groups == value.shape[axis] > 1:
        return None  # a depthwise output goes with its input
    place = op.layer or op.node
    weight = getattr(module, "weight", None)
    plain = isinstance(module, (nn.Linear, ConvNd)) and op.groups == 1 and isinstance(weight, Tensor)
    transposed = op.window is not None and op.window.transposed
    source = read_node(cut.graph, node, value)
    known = is_recorded(cut.graph, source, value, recorded)
    if not plain or transposed or op.weight.computed or op.weight.view is not None or not known:
        if known:
            assert isinstance(source, fx.Node)
            entries, same = constant_entries(recorded[source.name], axis, gone)
            harmless = same & ~entries.any(1)
        else:
            zero = zero_in_parts(cut.graph, cut, value, recorded)
            harmless = zero[cut.labels.root[sides.columns[gone]]]
        harmless |= ~_is_read(op, sides, cut, gone)
        cut.give_back(sides.columns[gone][~harmless], f"{place}: reads it, and cannot take it into a bias")
        return None
    assert isinstance(weight, Tensor)
    assert isinstance(source, fx.Node)
    rows = ~cut.is_gone(sides.rows)
    removed = weight.detach().cpu()[:, gone]
    taps = removed.flatten(2).sum(2) if removed.dim() > 2 else removed
    read = removed[rows].flatten(2).any(2).any(0) if removed.dim() > 2 else (removed[rows] != 0).any(0)
    entries, same = constant_entries(recorded[source.name], axis, gone)
    if not entries.shape[1]:  # no rows in these runs, as for an expert without tokens
        entries, same = entries.new_zeros(len(entries), 1), ~read
    even = same & (entries == entries[:, :1]).all(1)
    zero = even & (entries[:, 0] == 0)
    padded = (
        op.window is not None and op.window.mode == "zeros" and any(p != (0, 0) for p in op.window.padding)
    )
    labels = sides.columns[gone]
    cut.give_back(labels[read & ~even], f"{place}: reads it, and it is no constant")
    if padded or not fold_constants:
        reason = "a constant under zero padding" if padded else "a constant"
        cut.give_back(labels[read & even & ~zero], f"{place}: {reason}")
        return None
    left = cut.is_gone(labels) & read  # what is not read may be no number: zero times that is none either
    wide = torch.promote_types(torch.promote_types(taps.dtype, entries.dtype), torch.float64)
    return taps[:, left].to(wide) @ entries[left, 0].to(wide)


def _is_read(op: ir.Kernel, sides: Sides, cut: Cut, gone: Tensor) -> Tensor:
    """Mark the columns that go and have a weight in a row that stays (all, where no mask is known).

    A view of a parameter, such as the part of a packed projection, is read as the layer reads it.
    """
    name = op.weight.name
    if name is None or name not in cut.graph.kernels:
        return torch.ones(int(gone.sum()), dtype=torch.bool)
    if op.weight.view is not None:
        operand = op.weight.operand(lambda name: cut.nonzero(name).float()) != 0
        if op.window is not None:
            operand = swap_orientation(operand, op.groups) if op.window.transposed else operand
            operand = operand.flatten(2).any(2)
        if operand.shape != (len(sides.rows), len(sides.columns)):
            return torch.ones(int(gone.sum()), dtype=torch.bool)
        return operand[~cut.is_gone(sides.rows)].any(0)[gone]
    kernels = cut.graph.kernels[name]
    by_row, by_column = labels_by_weight(sides.rows, sides.columns, kernels)
    used = cut.nonzero(name) & ~cut.is_gone(by_row)
    read = torch.zeros(cut.labels.count, dtype=torch.bool)
    read[by_column[used]] = True
    return read[sides.columns[gone]]
