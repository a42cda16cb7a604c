"""Compile a graph for one resolution: steps on reduced tensors, in the order of execution.

A :class:`Program` is compiled once per graph and resolution, and run by every objective. A product passes the
paths through each factor where the other one is *present*, that is, not Zero. Values that are present
everywhere whatever the masks are (after a bias, a sigmoid) are found here; the presence of others is computed
in every run, for those values that some product asks about.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import Borders, Compiled, LinearMap
from fxprune.paths.layout import Layout, collapsed, join, layout_of_labels, reader, reduced_shape
from fxprune.paths.products import Product, compile_product
from fxprune.paths.steps import compile_linear

__all__ = ["Program", "Resolution", "Step", "compile_bound", "compile_graph"]

Resolution = Literal["spatial", "channel"]


@dataclass(frozen=True)
class Half:
    """The paths of a product through its input ``live``, where its input ``other`` is present.

    ``ones``: where ``other`` is present everywhere, the shape of a tensor of ones that stands for it.
    """

    live: int
    other: int
    ones: tuple[int, ...] | None
    product: Product


@dataclass(frozen=True)
class Step:
    """One op, compiled.

    ``pattern`` is the value of a source. Otherwise paths are computed by ``linear``, or as the sum of
    ``halves``; presence, if ``needs_presence``, by ``linear`` or ``product``.
    """

    op: ir.AnyOp
    layout: Layout
    needs_presence: bool
    linear: LinearMap | None = None
    halves: tuple[Half, ...] = ()
    product: Product | None = None
    pattern: Tensor | None = None

    @property
    def output(self) -> int:
        return self.op.output.index


@dataclass(frozen=True)
class Program:
    """Steps in order of execution.

    ``shapes``: the reduced shape of every value. ``outputs``: the live values whose entries add up to R, with
    their layouts.
    """

    steps: tuple[Step, ...]
    shapes: dict[int, tuple[int, ...]]
    outputs: tuple[tuple[int, Layout], ...]
    samples: int


def compile_graph(graph: ir.ChannelGraph, resolution: Resolution) -> Program:
    """The program of ``graph`` at ``resolution``; compiled once, then kept with the graph.

    Raises:
        ValueError: unknown resolution.
    """
    if resolution not in ("spatial", "channel"):
        raise ValueError(f"resolution: expected 'spatial' or 'channel', got {resolution!r}")
    return _kept(graph, "periodic" if resolution == "channel" else "zeros")


def compile_bound(graph: ir.ChannelGraph) -> Program:
    """The program of a part of the paths of ``graph``, in which positions of an image are mostly alike.

    Where it finds a path, there is one. It runs on fewer positions than that of ``compile_graph``.
    """
    return _kept(graph, "inner")


def _kept(graph: ir.ChannelGraph, borders: Borders) -> Program:
    if borders not in graph.programs:
        graph.programs[borders] = _compile(graph, borders)
    program: Program = graph.programs[borders]
    return program


def _compile(graph: ir.ChannelGraph, borders: Borders) -> Program:
    movements: dict[Hashable, Compiled] = {}  # those of the blocks of a network are the same
    full = _present_everywhere(graph)
    needed = _presence_needed(graph, full)
    layouts: dict[int, Layout] = {}
    steps: list[Step] = []
    outputs: list[tuple[int, Layout]] = []
    for op in _used(graph):
        index = op.output.index
        inputs = [layouts[value.index] for value in op.inputs]
        match op:
            case ir.Sink():
                outputs += [(value.index, layouts[value.index]) for value in op.inputs if value.live]
                continue
            case ir.Source():
                step = _source(op, index in needed)
            case ir.Gate() | ir.Mix():
                step = _product(op, inputs, full, index in needed)
            case ir.Gather():
                key = op.move, op.pads, tuple(inputs)
                if key not in movements:
                    movements[key] = compile_linear(op, inputs, borders)
                step = Step(op, movements[key][0], index in needed, linear=movements[key][1])
            case _:
                layout, linear = compile_linear(op, inputs, borders)
                step = Step(op, layout, index in needed, linear=linear)
        layouts[index] = step.layout
        steps.append(step)
    shapes = {index: reduced_shape(layout) for index, layout in layouts.items()}
    return Program(tuple(steps), shapes, tuple(outputs), graph.samples)


def _used(graph: ir.ChannelGraph) -> list[ir.AnyOp]:
    """Ops that some output depends on."""
    wanted: set[int] = set()
    used: list[ir.AnyOp] = []
    for op in reversed(graph.ops):
        if isinstance(op, ir.Sink) or op.output.index in wanted:
            wanted.update(value.index for value in op.inputs)
            used.append(op)
    return used[::-1]


# -- presence ------------------------------------------------------------------------------------
def _present_everywhere(graph: ir.ChannelGraph) -> set[int]:
    """Values that are not Zero at any entry, whatever the masks are."""
    full: set[int] = set()
    movements: dict[Hashable, bool] = {}

    def fills(op: ir.Gather) -> bool:
        key = op.move, tuple(value.shape for value in op.inputs)
        if key not in movements:
            movements[key] = _fills(op)
        return movements[key]

    for op in graph.ops:
        if _is_present_everywhere(op, [value.index in full for value in op.inputs], fills):
            full.add(op.output.index)
    return full


def _is_present_everywhere(op: ir.AnyOp, inputs: Sequence[bool], fills: Callable[[ir.Gather], bool]) -> bool:
    """Whether the output is present everywhere, given whether each input is."""
    match op:
        case ir.Source():
            return op.pattern is None
        case ir.Kernel():
            return op.bias
        case ir.Affine() | ir.Norm():
            return inputs[0] or op.bias
        case ir.Map():
            return inputs[0] or op.floor
        case ir.Sum():
            return any(inputs)
        case ir.Gather():
            return all(inputs) and not op.pads and not fills(op)
        case ir.Gate() | ir.Mix() | ir.Pool() | ir.Sink():
            return all(inputs)
        case ir.Opaque():
            return True
        case _:
            ir.refuse_kind(op)


def _fills(op: ir.Gather) -> bool:
    """Whether the movement fills in zeros."""
    ones = [torch.ones((), dtype=torch.float64).expand(value.shape) for value in op.inputs]
    moved = op.move(*ones)
    return bool(moved.numel()) and not bool(moved.amin())


def _presence_needed(graph: ir.ChannelGraph, full: set[int]) -> set[int]:
    """Values whose presence some product asks about, and those that it is computed from."""
    needed: set[int] = set()
    for op in reversed(graph.ops):
        wanted = op.output.index in needed
        for i, value in enumerate(op.inputs):
            others = [other for j, other in enumerate(op.inputs) if j != i]
            is_asked = isinstance(op, (ir.Gate, ir.Mix)) and any(other.live for other in others)
            if (wanted or is_asked) and value.index not in full:
                needed.add(value.index)
    return needed


# -- steps ---------------------------------------------------------------------------------------
def _source(op: ir.Source, needed: bool) -> Step:
    """Compile an input (ones) or a constant (its pattern)."""
    if op.pattern is None or not op.pattern.any():
        layout = _collapsed(op.output)
        value = 0.0 if op.pattern is not None else 1.0
        return Step(op, layout, needed, pattern=torch.full((1,) * len(layout), value))
    layout, reduced = layout_of_labels(op.pattern.long())
    return Step(op, layout, needed, pattern=reduced.float())


def _product(op: ir.Gate | ir.Mix, inputs: Sequence[Layout], full: set[int], needed: bool) -> Step:
    """Compile a product: paths through either factor, and its presence."""
    parts = [_half(op, inputs, place, full) for place, value in enumerate(op.inputs) if value.live]
    presence: list[tuple[Product, Layout]] = []
    if needed or not parts:
        first, second = (
            _collapsed(value) if value.index in full else layout
            for value, layout in zip(op.inputs, inputs, strict=True)
        )
        layout, product = compile_product(op, first, second)
        presence = [(product, layout)]
    joined = join([layout for _, layout in [*parts, *presence]], op.output.shape)
    halves = tuple(
        replace(half, product=_read_at(half.product, reader(layout, joined))) for half, layout in parts
    )
    own = next((_read_at(product, reader(layout, joined)) for product, layout in presence), None)
    return Step(op, joined, needed, halves=halves, product=own)


def _half(op: ir.Gate | ir.Mix, inputs: Sequence[Layout], place: int, full: set[int]) -> tuple[Half, Layout]:
    """Paths through the factor at ``place``; where the other is present everywhere, it is collapsed ones."""
    live, other = op.inputs[place], op.inputs[1 - place]
    layouts = list(inputs)
    ones = None
    if other.index in full:
        layouts[1 - place] = _collapsed(other)
        ones = (1,) * len(other.shape)
    layout, product = compile_product(op, layouts[0], layouts[1])
    return Half(live.index, other.index, ones, product if place == 0 else _swapped(product)), layout


def _collapsed(value: ir.Value) -> Layout:
    return tuple(collapsed(size) for size in value.shape)


def _swapped(product: Product) -> Product:
    return lambda x, y: product(y, x)


def _read_at(product: Product, read: Callable[[Tensor], Tensor]) -> Product:
    return lambda x, y: read(product(x, y))
