"""Check that a graph is whole: shapes, liveness, origins, index maps, parameters by axis and kernel sets.

In: the parts of a ChannelGraph, from a lowering or from a pass that has changed it. Out: nothing, or one
ValueError that names the op and the first fault found in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.graph import index_map
from fxprune.graph.ops import (
    Affine,
    AnyOp,
    Gate,
    Gather,
    Kernel,
    KernelSet,
    Map,
    Mix,
    Norm,
    Opaque,
    ParamUse,
    Pool,
    Sink,
    SizeLiteral,
    Source,
    Sum,
    Value,
    Window,
    refuse_kind,
)
from fxprune.graph.tensor_function import TensorFunction

__all__ = ["verify"]

Shape = Sequence[int]

MAPPED = 1 << 12
"""Entries of an output up to which an index map is checked entry by entry, and not by its shape alone."""

INPUTS = {Source: 0, Kernel: 1, Gate: 2, Mix: 2, Pool: 1, Norm: 1, Affine: 1, Map: 1}
"""How many inputs an op of each kind has; kinds that are not listed take any number."""


def verify(
    ops: Sequence[AnyOp],
    kernels: Mapping[str, KernelSet],
    results: Mapping[str, Sequence[Value]],
    constants: Mapping[int, Value],
    shapes: Mapping[str, Shape] | None = None,
    nodes: Collection[str] | None = None,
) -> None:
    """Raise for the first fault in a graph.

    Args:
        ops, kernels: of the graph.
        results: node -> the values that it yields.
        constants: the values that no op makes, by index.
        shapes: of all parameters and buffers of the network, where they are known.
        nodes: the names of all nodes of the captured graph, where they are known.

    Raises:
        ValueError: the op (or the kernel set, or the node) and what is wrong with it, on one line.
    """
    made: dict[int, Value] = dict(constants)
    known = {name: tuple(one.shape) for name, one in kernels.items()} | dict(shapes or {})
    for op in ops:
        place = f"op %{op.output.index} {op.kind} (node {op.node!r}, layer {op.layer!r})"
        _raise_first(place, _faults_of_values(op, made))
        _raise_first(place, _faults_of_origin(op, results, nodes))
        _raise_first(place, _faults_of_kind(op))
        for use in op.params:
            _raise_first(place, _faults_of_use(use, op, known, complete=shapes is not None))
        made[op.output.index] = op.output
    for name, one in kernels.items():
        uses = [op for op in ops if isinstance(op, Kernel) and op.weight.name == name]
        _raise_first(f"kernel set {name!r}", _faults_of_kernel_set(name, one, uses))
    for op in ops:
        if isinstance(op, Kernel) and op.weight.name is not None and op.weight.name not in kernels:
            raise ValueError(f"op %{op.output.index} Kernel: no kernel set {op.weight.name!r}")
    for node, values in results.items():
        for value in values:
            if made.get(value.index) != value:
                raise ValueError(f"node {node!r}: yields %{value.index}, which no op and no constant is")


def _raise_first(place: str, faults: Iterator[str]) -> None:
    for fault in faults:
        raise ValueError(f"{place}: {fault}")


# -- every op --------------------------------------------------------------------------------------------
def _faults_of_values(op: AnyOp, made: Mapping[int, Value]) -> Iterator[str]:
    """Inputs are values made before, the output is new, and paths reach it where they reach an input."""
    for value in op.inputs:
        if value.index not in made:
            yield f"reads %{value.index}, which no op before it makes"
        elif made[value.index] != value:
            yield f"reads {value}, which was made as {made[value.index]}"
    if op.output.index in made:
        yield f"makes %{op.output.index} a second time"
    expected = INPUTS.get(type(op))
    if expected is not None and len(op.inputs) != expected:
        yield f"has {len(op.inputs)} inputs, not {expected}"
    live = any(value.live for value in op.inputs)
    if not isinstance(op, (Source, Sink)) and op.output.live != live:
        yield f"its output is {'' if op.output.live else 'not '}live, its inputs are {'' if live else 'not'}"


def _faults_of_origin(
    op: AnyOp, results: Mapping[str, Sequence[Value]], nodes: Collection[str] | None
) -> Iterator[str]:
    """The op comes from a node of the captured graph; only that of the outputs may yield no tensor."""
    if not op.node:
        yield "names no node"
    if nodes is not None and op.node not in nodes:
        yield "the captured graph has no such node"
    if nodes is None and not isinstance(op, Sink) and op.node not in results:
        yield "no such node yields a tensor"


def _faults_of_use(use: ParamUse, op: AnyOp, shapes: Mapping[str, Shape], *, complete: bool) -> Iterator[str]:
    """Each axis of a parameter runs along axes that an input or the output has, and in its bounds."""
    if use.name not in shapes:
        if complete:
            yield f"reads {use.name!r}, which is no parameter or buffer"
        return
    shape = shapes[use.name]
    if len(use.axes) != len(shape):
        yield f"reads {use.name!r} of {len(shape)} axes along {len(use.axes)}"
        return
    values = {value.index: value for value in (*op.inputs, op.output)}
    for axis, (along, size) in enumerate(zip(use.axes, shape, strict=True)):
        if along is None:
            continue
        where = f"axis {axis} of {use.name!r}"
        if along.value not in values:
            yield f"{where} runs along %{along.value}, which is no input and not the output"
            continue
        value = values[along.value]
        if not along.axes or not all(0 <= one < len(value.shape) for one in along.axes):
            yield f"{where} runs along axes {along.axes} of a value of shape {value.shape}"
            continue
        entries = math.prod(value.shape[one] for one in along.axes)
        if along.index is None and entries != size:
            yield f"{where} has {size} entries, the axes that it runs along {entries}"
        if along.index is not None and len(along.index) != entries:
            yield f"{where} is indexed by {len(along.index)} entries, not {entries}"
        if along.index is not None and not all(-1 <= j < size for j in along.index):
            yield f"{where} is indexed beyond its {size} entries"


# -- kinds -----------------------------------------------------------------------------------------------
def _faults_of_kind(op: AnyOp) -> Iterator[str]:
    match op:
        case Source():
            yield from _faults_of_source(op)
        case Kernel():
            yield from _faults_of_kernel(op)
        case Sum() | Gate():
            yield from _faults_of_broadcast(op)
        case Gather():
            yield from _faults_of_gather(op)
        case Mix():
            yield from _faults_of_mix(op)
        case Pool():
            yield from _faults_of_pool(op)
        case Norm():
            yield from _faults_of_norm(op)
        case Affine():
            yield from _faults_of_broadcast(op)
        case Map():
            yield from _faults_of_axes(op, op.axes)
            yield from _differ("its input has shape", op.inputs[0].shape, op.output.shape)
        case Opaque():
            if not op.reason:
                yield "gives no reason"
        case Sink():
            yield from _differ("its output has shape", op.output.shape, ())
        case _:
            refuse_kind(op)


def _faults_of_source(op: Source) -> Iterator[str]:
    if op.pattern is not None:
        yield from _differ("its pattern has shape", op.pattern.shape, op.output.shape)
        if op.pattern.dtype != torch.bool:
            yield f"its pattern is of {op.pattern.dtype}, not bool"


def _faults_of_norm(op: Norm) -> Iterator[str]:
    yield from _faults_of_axes(op, op.axes)
    yield from _faults_of_broadcast(op)
    if op.groups > 1 and (len(op.output.shape) < 2 or op.output.shape[1] % op.groups):
        yield f"axis 1 of a value of shape {op.output.shape} has no {op.groups} equal groups"


def _faults_of_kernel(op: Kernel) -> Iterator[str]:
    x, y, weight = op.inputs[0].shape, op.output.shape, op.weight.shape
    taps = 0 if op.window is None else len(op.window.kernel)
    axis = len(y) - taps - 1
    if len(x) != len(y) or axis < 0 or len(weight) != taps + 2:
        yield f"a weight of shape {weight} with {taps} axes of taps maps {x} to {y}"
        return
    is_transposed = op.window is not None and op.window.transposed
    rows, columns = (x[axis], y[axis]) if is_transposed else (y[axis], x[axis])
    expected = (rows, columns // op.groups)
    if columns % op.groups or rows % op.groups or tuple(weight[:2]) != expected:
        yield f"a weight of shape {weight} in {op.groups} groups maps {x} to {y}"
    yield from _differ("axes before the channels map", x[:axis], y[:axis])
    if op.window is not None:
        yield from _differ("its window has taps", op.window.kernel, weight[2:])
        sizes = _window_sizes(op.window, x[axis + 1 :])
        yield from _differ("its window gives positions", sizes, y[axis + 1 :])
    if op.live_taps is not None:
        yield from _differ("its live taps have shape", op.live_taps.shape, weight[2:])


def _window_sizes(window: Window, sizes: Shape) -> Shape:
    """The numbers of positions that a convolution gives for an image of these sizes."""
    found = []
    for d, size in enumerate(sizes):
        pad, span = sum(window.padding[d]), window.dilation[d] * (window.kernel[d] - 1)
        if window.transposed:
            found.append((size - 1) * window.stride[d] - pad + span + 1 + window.output_padding[d])
        else:
            found.append((size + pad - span - 1) // window.stride[d] + 1)
    return tuple(found)


def _faults_of_gather(op: Gather) -> Iterator[str]:
    shape = _result_shape(op.move, op.inputs)
    if isinstance(shape, str):
        yield shape
        return
    yield from _differ("its movement gives shape", shape, op.output.shape)
    if op.inputs and max(math.prod(v.shape) for v in (*op.inputs, op.output)) <= MAPPED:
        yield from _faults_of_index_map(op)
    for axis, before, after in op.pads:
        grown = op.inputs[0].shape[axis] + before + after if axis < len(op.output.shape) else None
        if grown is None or grown != op.output.shape[axis]:
            yield f"axis {axis} padded by {before} and {after} has {grown} entries, not {op.output.shape}"
    for literal in op.literals:
        yield from _faults_of_literal(literal, op)


def _faults_of_index_map(op: Gather) -> Iterator[str]:
    """The map reads entries that the inputs have, and copies what the movement copies."""
    found = op.index_map()
    flat = found.flat_index()
    total = sum(math.prod(value.shape) for value in op.inputs)
    yield from _differ("its index map has shape", flat.shape, op.output.shape)
    if flat.numel() and not index_map.CONSTANT <= int(flat.min()) <= int(flat.max()) < total:
        yield f"its index map reads beyond the {total} entries of its inputs"
        return
    offset, tensors = 2, []
    for value in op.inputs:
        # Numbers that no sum or product of others gives by chance.
        count = math.prod(value.shape)
        tensors.append(torch.arange(offset, offset + count, dtype=torch.float64).sqrt().view(value.shape))
        offset += count
    copied, moved = found.apply(*tensors), op.move(*tensors)  # which may work in place
    if op.move.holds_tensors:  # numbers that the movement holds itself come from no input
        moved = moved.masked_fill(flat.view(moved.shape) == index_map.CONSTANT, 1)
    if not torch.equal(moved, copied):
        yield "its movement does more than to copy entries"


def _faults_of_literal(literal: SizeLiteral, op: Gather) -> Iterator[str]:
    """The number fits the size of the axis that it is said to depend on."""
    shape = op.output.shape if literal.side == "output" else op.inputs[0].shape
    where = f"the literal {literal.value} ({literal.role} of {literal.side} axis {literal.axis})"
    if not 0 <= literal.axis < len(shape):
        yield f"{where} names no axis of shape {shape}"
        return
    size = shape[literal.axis]
    if literal.role == "size" and literal.value < size:
        yield f"{where} is less than its {size} entries"
    if literal.role == "index" and not -size <= literal.value < size:
        yield f"{where} is beyond its {size} entries"
    if literal.role == "parts" and literal.value < 1:
        yield f"{where} makes no parts"


def _faults_of_mix(op: Mix) -> Iterator[str]:
    if not op.equation:
        shape = _result_shape(op.product, op.inputs) if op.product is not None else "has no product"
        yield from [shape] if isinstance(shape, str) else _differ("its product has", shape, op.output.shape)
        return
    left, right, out = op.equation.replace("->", ",").split(",")
    sizes: dict[str, int] = {}
    for letters, value in zip((left, right), op.inputs, strict=True):
        if len(letters) != len(value.shape):
            yield f"{letters!r} of {op.equation!r} has {len(letters)} axes, its input {value.shape}"
            return
        for letter, size in zip(letters, value.shape, strict=True):
            old = sizes.get(letter, 1)
            if 1 not in (old, size) and old != size:
                yield f"{letter!r} of {op.equation!r} has both {old} and {size} entries"
            sizes[letter] = size if old == 1 else old
    if not set(out) <= set(sizes):
        yield f"{op.equation!r} gives axes that no input has"
        return
    yield from _differ(f"{op.equation!r} gives shape", [sizes[letter] for letter in out], op.output.shape)


def _faults_of_pool(op: Pool) -> Iterator[str]:
    x, y = op.inputs[0].shape, op.output.shape
    yield from _faults_of_axes(op, op.dims)
    if op.window is not None:
        shape = _result_shape(op.window.own, op.inputs)
        yield from [shape] if isinstance(shape, str) else _differ("its window gives", shape, y)
    elif op.keepdim:
        yield from _differ("it gives", [1 if d in op.dims else n for d, n in enumerate(x)], y)
    else:
        yield from _differ("it gives", [n for d, n in enumerate(x) if d not in op.dims], y)


def _faults_of_axes(op: AnyOp, axes: Sequence[int]) -> Iterator[str]:
    rank = len(op.inputs[0].shape)
    if list(axes) != sorted(set(axes)) or not all(0 <= axis < rank for axis in axes):
        yield f"axes {tuple(axes)} are not in order, or its input has only {rank}"


def _faults_of_broadcast(op: AnyOp) -> Iterator[str]:
    """All inputs broadcast to the output."""
    both = _broadcast((*op.inputs, op.output))
    yield from _differ("with its inputs it broadcasts to", both, op.output.shape)


# -- shapes ----------------------------------------------------------------------------------------------
def _differ(text: str, found: Shape | None, expected: Shape) -> Iterator[str]:
    if found is None or tuple(found) != tuple(expected):
        yield f"{text} {None if found is None else tuple(found)}, not {tuple(expected)}"


def _broadcast(values: Sequence[Value]) -> Shape | None:
    """The shape that values broadcast to; ``None`` if they do not."""
    try:
        found: Shape = torch.broadcast_shapes(*(v.shape for v in values))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return found


def _result_shape(function: TensorFunction, inputs: Sequence[Value]) -> Shape | str:
    """The shape that a function gives for tensors of these shapes, or why it gives none."""
    shapes = [torch.empty(value.shape, device="meta") for value in inputs]
    fault = ""
    for form in (function, function.on("meta")):  # constants that are joined to shapes have to be shapes, too
        try:
            result = form(*shapes)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            fault = fault or f"{function} fails on its inputs: {' '.join(str(error).split())}"
            continue
        return tuple(result.shape) if isinstance(result, Tensor) else f"{function} gives no tensor"
    return fault


# -- kernel sets -----------------------------------------------------------------------------------------
def _faults_of_kernel_set(name: str, one: KernelSet, uses: Sequence[Kernel]) -> Iterator[str]:
    if one.name != name:
        yield f"is named {one.name!r}"
    if one.uses != len(uses) or not uses:
        yield f"counts {one.uses} uses, {len(uses)} ops read it"
    if one.macs != sum(op.macs for op in uses):
        yield f"counts {one.macs} multiply-adds, its ops {sum(op.macs for op in uses)}"
    rows, columns = one.out_space.size, one.in_space.size
    if one.transposed:
        rows, columns = columns, rows
    yield from _differ("its spaces make", (rows, columns // one.groups), one.shape[:2])
    if columns % one.groups or rows % one.groups:
        yield f"spaces of {columns} and {rows} channels have no {one.groups} equal groups"
    if one.live_taps.dtype != torch.bool:
        yield f"its live taps are of {one.live_taps.dtype}, not bool"
