"""Small problems for testing methods, with and without a graph, and a network to compute by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxprune.capture import capture
from fxprune.graph.ir import ChannelGraph
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import dense, kept

NO_GRAPH = ChannelGraph(ops=(), kernels={}, samples=1)


def toy_a() -> nn.Sequential:
    """2-2-1 ReLU network without biases: W1 = [[1, -1], [2, 1]], W2 = [[1, -2]]."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
    return net


def toy_f() -> nn.Sequential:
    """The same network with W1 = [[-1, 1], [1, 1]], W2 = [[-1, -2]]."""
    net = toy_a()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))
        net[2].weight.copy_(torch.tensor([[-1.0, -2.0]]))
    return net


def half_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L = (f - y)^2 / 2, summed over the batch."""
    return (output - target).square().sum() / 2


TOY_A_DATA = (torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0]]))


def problem(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    budget: Any = "global",
    masks: dict[str, torch.Tensor] | None = None,
    only: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Problem:
    """A problem over all parameters of ``model`` that have two dimensions or more, or ``only`` these."""
    gm = model if isinstance(model, torch.fx.GraphModule) else torch.fx.symbolic_trace(model)
    weights = only or {name: p.detach() for name, p in gm.named_parameters() if p.dim() > 1}
    start = dense(weights) if masks is None else masks
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Problem(
        model=gm,
        graph=fields.pop("graph", NO_GRAPH),
        weights=weights,
        masks=start,
        budget=plan(budget, sparsity, shapes, kept(start)),
        generator=torch.Generator().manual_seed(seed),
        **fields,
    )


def asked(model: nn.Module, inputs: Any, sparsity: float, **fields: Any) -> Problem:
    """The problem over all kernels of a captured and lowered model."""
    gm = capture(model, inputs)
    graph = lower(gm)
    only = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    return problem(gm, sparsity, graph=graph, only=only, **fields)
