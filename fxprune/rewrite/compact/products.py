"""Keep removed channels that still count where no bias can take what they contribute.

A product of two values, such as queries and keys, and a sum over channels add up what all channels hold. A
channel on no path may hold numbers all the same: a norm before it makes of a constant what depends on others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxprune.channels.labels import Factor
from fxprune.channels.sums import summed_axes
from fxprune.graph import ChannelGraph, ir
from fxprune.lowering.norm_statistics import counted_node, kind_of
from fxprune.rewrite.compact.constants import Recorded
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.loose_statistics import keep_loose_statistics, loose_statistics
from fxprune.rewrite.compact.parts import node_of, parts_of, zero_in_parts

__all__ = ["keep_what_counts", "operand_nodes"]


def operand_nodes(graph: ChannelGraph, cut: Cut, nodes: Mapping[str, fx.Node]) -> set[str]:
    """Return the nodes whose numbers `keep_what_counts` asks for."""
    found = set()
    for op in graph.ops:
        for value, _ in _summed(op, nodes):
            if cut.touches(value):
                found |= {node_of(graph, part) for part in parts_of(graph, value)}
    for node, (_, axis) in loose_statistics(graph, nodes, cut).items():
        counted = None if axis is None else counted_node(node, axis)
        found |= set() if counted is None else {counted.name}
    return found - {""}


def keep_what_counts(graph: ChannelGraph, cut: Cut, recorded: Recorded, nodes: Mapping[str, fx.Node]) -> None:
    """Give back the channels whose terms in a product, a sum or a length are not zero.

    Terms that are one constant along the axis of a softmax which follows may go: it does not see the
    shift. Of queries and keys, that of the keys alone must be constant. A constant can be the largest or
    smallest of the channels, and stays.
    """
    for op in graph.ops:
        summed = [(value, axes) for value, axes in _summed(op, nodes) if axes]
        # An entry of a sum goes with all its terms, where these differ along other axes.
        alone = isinstance(op, ir.Pool)
        gone = [_gone_roots(cut, op, value, axes, alone) for value, axes in summed]
        if not gone or not any(len(roots) for roots in gone):
            continue
        zero = torch.zeros(cut.labels.count, dtype=torch.bool)
        even = torch.ones_like(zero)
        softmax = None if isinstance(op, ir.Pool) and op.extreme else _softmax_axes(graph, op.output)
        for (value, axes), along in zip(summed, _along(op, softmax or frozenset()), strict=True):
            own_zero, own_even = _numbers(graph, cut, value, axes, recorded, along)
            zero |= own_zero
            even &= own_even
        harmless = zero | even if softmax else zero
        roots = torch.cat(gone)
        cut.give_back(
            roots[~harmless[roots]], f"{op.layer or op.node}: adds it to others, and it is not zero"
        )
    keep_loose_statistics(graph, nodes, cut, recorded)


def _summed(op: ir.AnyOp, nodes: Mapping[str, fx.Node]) -> list[tuple[ir.Value, tuple[int, ...]]]:
    """The operands whose entries an op adds up, as they are or squared, each with the axes of the sum."""
    node = nodes.get(op.node)
    divides = node is not None and kind_of(node) == "length"
    if isinstance(op, ir.Norm) or divides:  # a product of two that are divided by their lengths, too
        return [(op.inputs[0], op.axes)] if isinstance(op, ir.Norm) and divides else []
    return summed_axes(op)


def _gone_roots(cut: Cut, op: ir.AnyOp, value: ir.Value, axes: tuple[int, ...], alone: bool) -> Tensor:
    """The groups that go of the labels along ``axes``; ``alone``: and along no others.

    Those whose sums go all the same, as the channels of a head that goes, are left out.
    """
    labels = [
        f.labels[~_sum_goes(cut, op, value, f)]
        for f in cut.labels.values.get(value.index, ())
        if set(f.axes) & set(axes) and (not alone or set(f.axes) <= set(axes))
    ]
    if not labels:
        return torch.zeros(0, dtype=torch.int64)
    roots = torch.unique(cut.labels.root[torch.cat(labels)])
    gone: Tensor = roots[cut.gone[roots]]
    return gone


def _sum_goes(cut: Cut, op: ir.AnyOp, value: ir.Value, factor: Factor) -> Tensor:
    """Mark the labels of a factor (bool) whose terms are in sums that go, in a product of two values."""
    marks = torch.zeros(factor.labels.shape, dtype=torch.bool)
    if not isinstance(op, ir.Mix):
        return marks
    inputs, _, out = op.equation.partition("->")
    letters = next(own for own, one in zip(inputs.split(","), op.inputs, strict=True) if one == value)
    own_letters = [letters[axis] for axis in factor.axes]
    for axes, left in cut.mask(op.output):
        others = [axis for axis in axes if out[axis] not in own_letters]
        if len(others) < len(axes):
            some = left.any(others, keepdim=True) if others else left
            size = {letter: some.shape[axis] for axis, letter in enumerate(out)}
            names = [out[axis] for axis in sorted(axes) if axis not in others]
            dense = some.reshape([size[letter] for letter in names])
            turned = dense.permute([names.index(letter) for letter in letters if letter in names])
            marks |= ~turned.reshape([size[letter] if letter in names else 1 for letter in letters])
    return marks


def _along(op: ir.AnyOp, softmax: frozenset[int]) -> list[tuple[int, ...] | None]:
    """The axes of each operand along which its entries must not change; None for all of them.

    ``softmax``: the axes of a softmax of the result, counted from the last one.
    """
    if not isinstance(op, ir.Mix):
        return [None]
    inputs, _, out = op.equation.partition("->")
    letters = {out[axis] for axis in softmax}
    return [tuple(axis for axis, letter in enumerate(own) if letter in letters) for own in inputs.split(",")]


def _numbers(
    graph: ChannelGraph,
    cut: Cut,
    value: ir.Value,
    axes: tuple[int, ...],
    recorded: Recorded,
    along: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Mark the groups whose entries in ``value`` are zero in both runs, and those that do not change.

    ``along``: the axes that are asked for changes, if not all, and both runs.
    """
    zero = torch.zeros(cut.labels.count, dtype=torch.bool)
    parts = parts_of(graph, value)
    if len(parts) > 1:  # what is zero in all that a function adds up by itself
        return zero_in_parts(graph, cut, value, recorded), zero
    runs = recorded.get(node_of(graph, parts[0])) if parts else None
    value = parts[0] if parts else value
    # How many entries a mask picks depends on the numbers of a run.
    if runs is None or any(run.shape != torch.Size(value.shape) for run in runs):
        return zero, zero.clone()
    even = zero.clone()
    both = torch.stack(runs)
    for factor in cut.labels.values.get(value.index, ()):
        if not set(factor.axes) & set(axes):
            continue
        others = [0, *(axis + 1 for axis in range(len(value.shape)) if axis not in factor.axes)]
        asked = others if along is None else [axis + 1 for axis in along]
        low, high = both.amin(others), both.amax(others)
        roots = cut.labels.root[factor.labels].flatten()
        steady = torch.ones_like(both, dtype=torch.bool)
        if asked:
            steady = both.amin(asked, keepdim=True) == both.amax(asked, keepdim=True)
        is_zero, is_even = ((low == 0) & (high == 0)).flatten(), steady.all(others)
        if set(asked) - set(others):  # channels along the axis of the softmax
            is_even = torch.zeros_like(low, dtype=torch.bool)
        for marks, own in ((zero, is_zero), (even, is_even.flatten())):
            marks[roots] = True
            marks[roots[~own]] = False
    return zero, even


def _softmax_axes(graph: ChannelGraph, value: ir.Value) -> frozenset[int] | None:
    """The axes of the softmaxes that alone read a value, perhaps scaled and with something added first.

    They are counted from the last one, as -1; ``None`` if something else reads it.
    """
    found = frozenset[int]()
    for op in (op for op in graph.ops if value in op.inputs):
        own: frozenset[int] | None = None
        if isinstance(op, ir.Map) and op.axes:
            own = frozenset(axis - len(value.shape) if axis >= 0 else axis for axis in op.axes)
        elif isinstance(op, ir.Affine | ir.Sum):
            own = _softmax_axes(graph, op.output)
        if own is None:
            return None
        found |= own
    return found or None
