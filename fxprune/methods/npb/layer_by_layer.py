"""Deciding on layers one after the other: a forward count of paths that asks for each parameter on its way.

In: a :class:`ChannelGraph` and a function that chooses the weights of one parameter, given how many paths
arrive at it. Out: all that it chose. Layer-wise methods see the true number of incoming paths, also behind
residual sums, products and attention, because the traversal is the interpreter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.count import _Operands, _Run
from fxprune.paths.layout import Layout
from fxprune.paths.program import Program, Resolution, Step, compile_graph
from fxprune.paths.scaled import Counted, Scaled

__all__ = ["decide"]

Choose = Callable[[str, Tensor], Tensor]


def decide(
    graph: ir.ChannelGraph,
    choose: Choose,
    *,
    known: Mapping[str, Tensor] | None = None,
    resolution: Resolution = "spatial",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Asks ``choose(name, incoming)`` for the weights of every parameter, in the order of execution.

    Args:
        graph: the lowered network.
        choose: gets the parameter's name and the number of paths that arrive at the input channel of each of
            its weights (of the parameter's shape, summed over positions, scaled so that the largest is 1;
            zeros throughout where none arrives), under all choices so far; it returns non-negative weights of
            that shape, a mask for instance.
        known: weights of parameters that are not asked for.
        resolution: ``"spatial"`` counts paths position by position, ``"channel"`` on a periodic image.
        dtype: of the computation.

    Returns:
        What ``choose`` returned, by name. Parameters that no live value meets are not asked for; a parameter
        that is used twice is decided where it is met first.

    Example:
        >>> import fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 2)))
        >>> first = torch.tensor([[1, 1], [1, 0]])
        >>> found = decide(graph, lambda name, p: first if name == "0.weight" else (p == 1).double())
        >>> found["1.weight"]
        tensor([[1., 0.]], dtype=torch.float64)
    """
    program = compile_graph(graph, resolution)
    leaves = {name: weight.to(dtype) for name, weight in (known or {}).items()}
    device = next((weight.device for weight in leaves.values()), torch.device("cpu"))
    algebra = Counted(dtype, device, "sum")
    with torch.no_grad():
        run = _Deciding(program, algebra, _Operands(graph, leaves, dtype, device), choose)
        run.total()
    return run.chosen


class _Deciding(_Run):
    """A traversal that fills in its own weights."""

    def __init__(self, program: Program, algebra: Counted, operands: _Operands, choose: Choose) -> None:
        super().__init__(program, algebra, operands)
        self.choose = choose
        self.chosen: dict[str, Tensor] = {}
        self.layouts = {step.output: step.layout for step in program.steps}

    def _paths(self, step: Step) -> Scaled:
        op = step.op
        if isinstance(op, ir.Kernel) and op.weight.name is not None:
            name = op.weight.name
            if name not in self.operands.leaves:
                arriving = channel_totals(op, self.paths[op.inputs[0].index].x, self.layouts)
                incoming = _per_weight(op, arriving, self.operands.graph.kernels[name].shape)
                self.chosen[name] = self.choose(name, incoming)
                self.operands.leaves[name] = self.chosen[name].to(incoming)
        return super()._paths(step)


def channel_totals(op: ir.Kernel, x: Tensor, layouts: Mapping[int, Layout]) -> Tensor:
    """Sum of the reduced input ``x`` over all but its channels: one number per input channel, at most 1."""
    layout = layouts[op.inputs[0].index]
    axis = len(layout) - 1 if op.window is None else len(layout) - 1 - len(op.window.kernel)
    for dim, classes in enumerate(layout):
        if dim != axis and not classes.is_collapsed:  # a collapsed axis is the same factor for all channels
            shape = [1] * x.dim()
            shape[dim] = classes.count
            x = (x * classes.multiplicity().to(x).reshape(shape)).sum(dim, keepdim=True)
    totals = x.flatten().index_select(0, layout[axis].index().to(x.device))
    top = totals.max()
    return totals / top if float(top) > 0 else totals


def _per_weight(op: ir.Kernel, arriving: Tensor, shape: torch.Size) -> Tensor:
    """``arriving`` (per input channel of the op) at every weight of the parameter, through the op's view."""
    operand = list(op.weight.shape)
    if op.window is not None and op.window.transposed:
        spread = arriving.reshape(-1, *[1] * (len(operand) - 1)).expand(operand)
    else:
        rows = arriving.reshape(op.groups, -1).repeat_interleave(operand[0] // op.groups, 0)
        spread = rows.reshape(*operand[:2], *[1] * (len(operand) - 2)).expand(operand)
    if op.weight.view is None:
        return spread
    leaf = torch.zeros(shape, dtype=arriving.dtype, device=arriving.device)
    with torch.enable_grad():
        leaf.requires_grad_()
        (found,) = torch.autograd.grad(op.weight.operand(lambda _: leaf), leaf, spread)
    return found
