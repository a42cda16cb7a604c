"""From the nodes of the captured graph to the values of the channel graph, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import NETS, captured_net, lowered_net
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.graph import ChannelGraph, ir


def lowered(net: nn.Module, inputs: Any) -> tuple[fx.GraphModule, ChannelGraph]:
    gm = fxprune.capture(net, inputs)
    return gm, fxprune.lower(gm)


def values_in(result: Any) -> list[ir.Value]:
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [value for item in result for value in values_in(item)]
    return [result] if isinstance(result, ir.Value) else []


class Encoder(nn.Module):
    """A leaf whose inside is lowered in place, after a layer of the network's own with the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.linear1(x))
        return y


def test_ops_from_the_inside_of_a_leaf_name_the_leafs_node() -> None:
    gm, graph = lowered(Encoder(), torch.ones(2, 3, 8))
    nodes = {node.name: node for node in gm.graph.nodes}
    assert {op.node for op in graph.ops} <= set(nodes)
    inside = [op for op in graph.ops if op.node == "encoder"]
    assert len(inside) > 15
    assert all(op.inner for op in inside)
    outside = [op for op in graph.ops if op.node == "linear1"]
    assert [op.kind for op in outside] == ["Kernel"]
    assert not outside[0].inner
    assert graph.value_of("encoder") == inside[-1].output


def test_a_leaf_inside_of_a_leaf_names_both() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    gm, graph = lowered(net, torch.ones(2, 3, 8))
    assert {op.node for op in graph.ops} <= {node.name for node in gm.graph.nodes}


class SeveralResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.linear(x).chunk(2, -1)
        scale = self.table + 1
        return {"sum": a + self.table, "product": b * scale, "relu": a.relu()}


def test_results_of_a_node_keep_their_form() -> None:
    gm, graph = lowered(SeveralResults(), torch.ones(2, 4))
    chunk = graph.value_of("chunk")
    assert isinstance(chunk, tuple)
    assert [value.shape for value in chunk] == [(2, 3), (2, 3)]
    first, second = (node for node in gm.graph.nodes if node.name.startswith("getitem"))
    assert graph.value_of(first) == chunk[0]
    assert graph.value_of(second) == chunk[1]
    assert graph.nodes_of(chunk[1])[:2] == (ir.NodeOutput("chunk", (1,)), ir.NodeOutput(second.name))


def test_constants_have_values_that_no_op_makes() -> None:
    _, graph = lowered(SeveralResults(), torch.ones(2, 4))
    table = graph.value_of("table")
    assert table.shape == (3,)
    assert not table.live
    assert graph.op_of(table) is None
    assert graph.constants[table.index].node == "table"
    assert graph.constants[table.index].dtype == torch.float32
    assert graph.value_of("add") != table


class PositionTable(nn.Module):
    """A constant that is joined to a value: an op reads it, so that an op makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.token = nn.Linear(4, 4), nn.Parameter(torch.ones(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token, self.linear(x)], 1)


def test_a_constant_that_an_op_reads_is_the_value_of_its_node() -> None:
    _, graph = lowered(PositionTable(), torch.ones(2, 3, 4))
    token = graph.value_of("token")
    source = graph.op_of(token)
    assert isinstance(source, ir.Source)
    assert source.node == "token"
    gather = graph.op_of(graph.value_of("cat"))
    assert isinstance(gather, ir.Gather)
    assert token in gather.inputs


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.sigmoid_()
        y[:, 0] = x[:, 0]
        return y


def test_a_write_in_place_is_the_value_of_the_node_that_writes() -> None:
    gm, graph = lowered(InPlace(), torch.ones(2, 4))
    (sink,) = (op for op in graph.ops if isinstance(op, ir.Sink))
    write = next(node for node in gm.graph.nodes if node.name.startswith("setitem"))
    assert graph.value_of(write) == sink.inputs[0]
    before = graph.op_of(graph.value_of("linear"))
    assert isinstance(before, ir.Kernel)


def test_a_node_that_yields_no_tensor_has_no_value() -> None:
    _, graph = lowered(InPlace(), torch.ones(2, 4))
    with pytest.raises(KeyError, match="'nowhere'"):
        graph.value_of("nowhere")


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_node_that_yields_a_tensor_has_a_value(name: str) -> None:
    """Of the shape that the node was captured with; and the value leads back to the node."""
    gm, graph = captured_net(name), lowered_net(name)
    for node in gm.graph.nodes:
        shapes = [tuple(val.shape) for val in fx_leaves(node.meta["val"]) if isinstance(val, Tensor)]
        if not shapes or node.op == "output":
            continue
        values = values_in(graph.value_of(node))
        assert [value.shape for value in values] == shapes
        for value in values:
            assert node.name in {place.node for place in graph.nodes_of(value)}


def fx_leaves(val: Any) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(val)
    return leaves


def test_a_node_that_is_not_there_is_named() -> None:
    _, graph = lowered(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(KeyError, match=r"'nothing' is not in the graph or yields no tensor"):
        graph.value_of("nothing")
