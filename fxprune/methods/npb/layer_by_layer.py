"""Choose the weights of one layer after the other, given the number of paths that arrive at each.

The numbers come from the traversal that counts paths everywhere else, so they are right behind residual sums,
products and attention, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.layout import Layout
from fxprune.paths.program import Resolution, compile_graph
from fxprune.paths.scaled import Counted, Scaled
from fxprune.paths.traversal import EdgeWeights, Traversal

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
    """Call ``choose(name, incoming)`` for the weights of every parameter, in the order of execution.

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
    edges = EdgeWeights(graph, leaves, dtype, device)
    layouts = {step.output: step.layout for step in program.steps}
    chosen: dict[str, Tensor] = {}

    def choose_weights(op: ir.Kernel, arriving: Scaled[Tensor]) -> None:
        name = op.weight.name
        if name is None or name in edges.leaves:
            return
        totals = channel_totals(op, arriving.values, layouts)
        incoming = _per_weight(op, totals, graph.kernels[name].shape)
        chosen[name] = choose(name, incoming)
        edges.leaves[name] = chosen[name].to(incoming)

    with torch.no_grad():
        Traversal(program, Counted(dtype, device, "sum"), edges, choose_weights).total()
    return chosen


def channel_totals(op: ir.Kernel, x: Tensor, layouts: Mapping[int, Layout]) -> Tensor:
    """Paths per input channel, summed over all other axes and scaled so that the largest is 1.

    ``x``: the reduced input of ``op``.
    """
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
    """Spread ``arriving`` (per input channel of the op) over the weights of the parameter that it reads."""
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
