"""A graph compiled for one resolution: steps on reduced tensors, in execution order.

In: a :class:`ChannelGraph`. Out: a :class:`Program`, compiled once per graph and resolution and run by every
objective. Besides its paths a value may need its *presence* (is the entry ever not Zero?): a product passes
each factor where the other is present. What is present for sure (after a bias, a sigmoid) is known here and
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import Linear
from fxprune.paths.layout import Layout, collapsed, join, layout_of_labels, reader, reduced_shape
from fxprune.paths.products import Product, compile_product
from fxprune.paths.steps import compile_linear

__all__ = ["Program", "Resolution", "Step", "compile_graph"]

Resolution = Literal["spatial", "channel"]


@dataclass(frozen=True)
class Half:
    """One half of a product: paths of input ``live``, where input ``other`` is present.

    ``ones`` is the shape of a tensor of ones to take for it where it is present everywhere.
    """

    live: int
    other: int
    ones: tuple[int, ...] | None
    product: Product


@dataclass(frozen=True)
class Step:
    """One op. ``linear`` or ``halves`` make its paths; ``linear`` or ``product`` its presence, if
    ``needs_presence``.
    """

    op: ir.Op
    layout: Layout
    is_full: bool
    needs_presence: bool
    linear: Linear | None = None
    halves: tuple[Half, ...] = ()
    product: Product | None = None
    pattern: Tensor | None = None

    @property
    def output(self) -> int:
        return self.op.output.index


@dataclass(frozen=True)
class Program:
    """``steps`` in order; ``outputs`` are the live values whose entries add up to R, with their layouts.

    ``shapes`` gives the reduced shape of every value.
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
    if resolution not in graph.programs:
        graph.programs[resolution] = _compile(graph, periodic=resolution == "channel")
    program: Program = graph.programs[resolution]
    return program


def _compile(graph: ir.ChannelGraph, *, periodic: bool) -> Program:
    full = _presence_known(graph)
    needed = _presence_needed(graph, full)
    layouts: dict[int, Layout] = {}
    steps: list[Step] = []
    outputs: list[tuple[int, Layout]] = []
    for op in _used(graph):
        index = op.output.index
        if isinstance(op, ir.Sink):
            outputs += [(value.index, layouts[value.index]) for value in op.inputs if value.live]
            continue
        inputs = [layouts[value.index] for value in op.inputs]
        if isinstance(op, ir.Source):
            step = _source(op, index in full, index in needed)
        elif isinstance(op, (ir.Gate, ir.Mix)):
            step = _product(op, inputs, full, index in needed)
        else:
            layout, linear = compile_linear(op, inputs, periodic=periodic)
            step = Step(op, layout, index in full, index in needed, linear=linear)
        layouts[index] = step.layout
        steps.append(step)
    shapes = {index: reduced_shape(layout) for index, layout in layouts.items()}
    return Program(tuple(steps), shapes, tuple(outputs), graph.samples)


def _used(graph: ir.ChannelGraph) -> list[ir.Op]:
    """Ops that some output depends on; what is computed and thrown away has no paths."""
    wanted: set[int] = set()
    used: list[ir.Op] = []
    for op in reversed(graph.ops):
        if isinstance(op, ir.Sink) or op.output.index in wanted:
            wanted.update(value.index for value in op.inputs)
            used.append(op)
    return used[::-1]


# -- presence ------------------------------------------------------------------------------------
def _presence_known(graph: ir.ChannelGraph) -> set[int]:
    """Values that are not Zero anywhere, whatever the masks are."""
    full: set[int] = set()
    for op in graph.ops:
        known = [value.index in full for value in op.inputs]
        if isinstance(op, ir.Source):
            present = op.pattern is None
        elif isinstance(op, ir.Kernel):
            present = op.bias
        elif isinstance(op, (ir.Affine, ir.Norm, ir.Map)):
            present = known[0] or (op.floor if isinstance(op, ir.Map) else op.bias)
        elif isinstance(op, ir.Sum):
            present = any(known)
        elif isinstance(op, ir.Gather):
            present = all(known) and not op.pads and not _fills(op)
        else:
            present = isinstance(op, ir.Opaque) or all(known)
        if present:
            full.add(op.output.index)
    return full


def _fills(op: ir.Gather) -> bool:
    """Whether the movement fills in zeros of its own."""
    ones = [torch.ones((), dtype=torch.float64).expand(value.shape) for value in op.inputs]
    return not bool(op.move(*ones).all())


def _presence_needed(graph: ir.ChannelGraph, full: set[int]) -> set[int]:
    """Values whose presence some product asks for, and those that it is computed from."""
    needed: set[int] = set()
    for op in reversed(graph.ops):
        wanted = op.output.index in needed
        for i, value in enumerate(op.inputs):
            others = [other for j, other in enumerate(op.inputs) if j != i]
            asked = isinstance(op, (ir.Gate, ir.Mix)) and any(other.live for other in others)
            if (wanted or asked) and value.index not in full:
                needed.add(value.index)
    return needed


# -- steps ---------------------------------------------------------------------------------------
def _source(op: ir.Source, is_full: bool, needed: bool) -> Step:
    if op.pattern is None or not op.pattern.any():
        layout = tuple(collapsed(size) for size in op.output.shape)
        value = 0.0 if op.pattern is not None else 1.0
        return Step(op, layout, is_full, needed, pattern=torch.full((1,) * len(layout), value))
    layout, reduced = layout_of_labels(op.pattern.long())
    return Step(op, layout, is_full, needed, pattern=reduced.float())


def _product(op: ir.Gate | ir.Mix, inputs: Sequence[Layout], full: set[int], needed: bool) -> Step:
    """Paths through either factor; a factor that is present everywhere is a collapsed tensor of ones."""
    first, second = op.inputs
    parts: list[tuple[Half, Layout]] = []
    for place, (live, other) in enumerate(((first, second), (second, first))):
        if not live.live:
            continue
        layouts = list(inputs)
        ones = None
        if other.index in full:
            layouts[1 - place] = tuple(collapsed(size) for size in other.shape)
            ones = (1,) * len(other.shape)
        layout, product = compile_product(op, layouts[0], layouts[1])
        ordered = product if place == 0 else _swapped(product)
        parts.append((Half(live.index, other.index, ones, ordered), layout))
    joined = join([layout for _, layout in parts], op.output.shape)
    own = None
    if needed or not parts:
        known = [_known(value, x, full) for value, x in zip(op.inputs, inputs, strict=True)]
        own_layout, own = compile_product(op, known[0], known[1])
        joined = join([joined, own_layout], op.output.shape)
        own = _placed(own, reader(own_layout, joined))
    halves = tuple(
        replace(half, product=_placed(half.product, reader(layout, joined))) for half, layout in parts
    )
    return Step(op, joined, op.output.index in full, needed, halves=halves, product=own)


def _known(value: ir.Value, layout: Layout, full: set[int]) -> Layout:
    return tuple(collapsed(size) for size in value.shape) if value.index in full else layout


def _swapped(product: Product) -> Product:
    return lambda x, y: product(y, x)


def _placed(product: Product, place: Callable[[Tensor], Tensor]) -> Product:
    return lambda x, y: place(product(x, y))
