"""Every pass refuses an op of a kind that it does not know, with the kind and the node in the message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph import ChannelGraph, ir
from fxprune.methods.npb.layer_by_layer import decide
from fxprune.methods.phew.walks import Walks
from fxprune.methods.px.weighted_outputs import WeightedOutputs
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow, reach
from fxprune.paths.layout import collapsed
from fxprune.paths.products import compile_product
from fxprune.paths.program import compile_graph
from fxprune.paths.steps import compile_linear


@dataclass(frozen=True, eq=False)
class Twist(ir.Op):
    """A kind that the package does not have."""


def with_foreign_kind() -> tuple[ChannelGraph, Any]:
    """A network whose sigmoid has become a Twist, and that op."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 4)))
    place = next(place for place, op in enumerate(graph.ops) if isinstance(op, ir.Map))
    old = graph.ops[place]
    twist = Twist(old.output, old.inputs, old.node, old.layer)
    ops = (*graph.ops[:place], cast(ir.AnyOp, twist), *graph.ops[place + 1 :])
    return replace(graph, ops=ops), twist


GRAPH_CONSUMERS: dict[str, Callable[[ChannelGraph], object]] = {
    "summary": lambda graph: graph.summary(),
    "text": lambda graph: graph.text(),
    "links": lambda graph: graph.links(),
    "channel programs": lambda graph: compile_graph(graph, "channel"),
    "spatial programs": lambda graph: compile_graph(graph, "spatial"),
    "flow": lambda graph: flow(graph, {}),
    "reach": lambda graph: reach(graph, {}),
    "circuit": circuit,
    "npb": lambda graph: decide(graph, lambda name, incoming: incoming),
    "phew": lambda graph: Walks(graph, {}),
    "px": WeightedOutputs,
}
COLLAPSED = (collapsed(2), collapsed(6))
OP_CONSUMERS: dict[str, Callable[[Any], object]] = {
    "steps": lambda op: compile_linear(op, [COLLAPSED], "periodic"),
    "products": lambda op: compile_product(op, COLLAPSED, COLLAPSED),
}


@pytest.mark.parametrize("consumer", GRAPH_CONSUMERS)
def test_passes_over_graphs_refuse_an_unknown_kind(consumer: str) -> None:
    graph, twist = with_foreign_kind()
    with pytest.raises(TypeError, match=f"op kind Twist .node '{twist.node}'"):
        GRAPH_CONSUMERS[consumer](graph)


@pytest.mark.parametrize("consumer", OP_CONSUMERS)
def test_functions_of_ops_refuse_an_unknown_kind(consumer: str) -> None:
    _, twist = with_foreign_kind()
    with pytest.raises(TypeError, match=f"op kind Twist .node '{twist.node}'"):
        OP_CONSUMERS[consumer](twist)


def test_linear_steps_refuse_products_sources_and_sinks() -> None:
    """They are ops, but a linear function cannot stand for them."""
    graph, _ = with_foreign_kind()
    (source,) = (op for op in graph.ops if isinstance(op, ir.Source))
    with pytest.raises(TypeError, match="op kind Source"):
        compile_linear(cast(Any, source), [], "zeros")
