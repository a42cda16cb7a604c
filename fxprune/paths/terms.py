"""Count the terms of contractions that have no prunable weight: products of two values, fixed filters.

A term multiplies one entry by another and adds the result up. It is on a path while one of the two lies on a
path from the input, the other is not Zero, and what they are added to leads to the output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import EvalContext
from fxprune.paths.count import run_tested
from fxprune.paths.layout import Layout, join, reader
from fxprune.paths.products import compile_product
from fxprune.paths.program import Resolution, Step
from fxprune.paths.traversal import Traversal

__all__ = ["count_terms", "has_no_parameter"]


def has_no_parameter(op: ir.AnyOp) -> bool:
    """Whether ``op`` is a contraction without a prunable weight."""
    return isinstance(op, ir.Mix) or (isinstance(op, ir.Kernel) and op.weight.name is None)


def count_terms(
    graph: ir.ChannelGraph, masks: Mapping[str, Tensor], *, resolution: Resolution = "spatial"
) -> dict[int, float]:
    """Count the terms on paths, for the whole batch, of every contraction without a prunable weight.

    Args:
        graph: the lowered network.
        masks: bool (or 0/1) tensors by kernel name; a kernel that is missing counts as dense.
        resolution: ``"spatial"``, or ``"channel"``, which reads images as periodic.

    Returns:
        The index of each contraction's output -> its number of terms on paths.

    Example:
        >>> import torch, fxprune
        >>> class Square(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(4, 3, bias=False)
        ...     def forward(self, x):  # (2, 4) -> (2, 2)
        ...         return self.linear(x) @ self.linear(x).T
        >>> graph = fxprune.lower(fxprune.capture(Square(), torch.ones(2, 4)))
        >>> list(count_terms(graph, {}).values())  # 2 x 2 sums of 3 terms
        [12.0]
        >>> mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
        >>> list(count_terms(graph, {"linear.weight": mask}).values())
        [8.0]
    """
    ops = [op for op in graph.ops if has_no_parameter(op) and op.output.live]
    if not ops:
        return {}
    keep = {value.index for op in ops for value in (*op.inputs, op.output)}
    traversal, total, _ = run_tested(graph, masks, resolution, keep)
    steps = {step.output: step for step in traversal.program.steps}
    layouts = {index: step.layout for index, step in steps.items()}
    found = {op.output.index: 0.0 for op in ops}
    used = [op for op in ops if op.output.index in steps]
    outputs = [traversal.paths_to(op.output) for op in used]
    for op, slope in zip(used, _slopes(total, outputs), strict=True):
        if slope is not None:
            step = steps[op.output.index]
            counts, layout = _terms(step, traversal, layouts)
            found[op.output.index] = _sum((counts, layout), ((slope > 0.5).double(), step.layout))
    return found


def _slopes(total: Tensor, outputs: list[Tensor | None]) -> list[Tensor | None]:
    """d total / d output; ``None`` where it does not depend on it."""
    places = [i for i, output in enumerate(outputs) if output is not None and output.requires_grad]
    slopes: list[Tensor | None] = [None] * len(outputs)
    if places and total.requires_grad:
        tensors = [output for i in places if (output := outputs[i]) is not None]
        for i, slope in zip(places, torch.autograd.grad(total, tensors, allow_unused=True), strict=True):
            slopes[i] = slope
    return slopes


def _terms(step: Step, traversal: Traversal, layouts: Mapping[int, Layout]) -> tuple[Tensor, Layout]:
    """The number of terms in every entry of the output, and the layout that they are in."""
    op = step.op
    with torch.no_grad():
        live = [_counted(traversal.paths_to(value), traversal, value) for value in op.inputs]
        if not isinstance(op, ir.Mix):
            assert step.linear is not None, "a contraction with weights is linear"
            context = EvalContext(lambda ref: ref.operand(_no_weight).double(), "any")
            return step.linear(context, live), step.layout
        there = [traversal.presence_of(value).double() for value in op.inputs]
        layout, product = compile_product(op, *(layouts[value.index] for value in op.inputs))
        (a, b), (all_a, all_b) = live, there
        return product(a, all_b) + product(all_a, b) - product(a, b), layout


def _counted(paths: Tensor | None, traversal: Traversal, value: ir.Value) -> Tensor:
    shape = traversal.program.shapes[value.index]
    return torch.zeros(shape, dtype=torch.float64) if paths is None else paths.double()


def _no_weight(name: str) -> Tensor:
    raise AssertionError(f"{name} is a prunable weight")


def _sum(first: tuple[Tensor, Layout], second: tuple[Tensor, Layout]) -> float:
    """The sum over all entries of the product of two reduced tensors."""
    layout = join([first[1], second[1]], [axis.size for axis in first[1]])
    product = reader(first[1], layout)(first[0]) * reader(second[1], layout)(second[0])
    for axis in reversed(layout):
        product = product @ axis.multiplicity().to(product)
    return float(product)
