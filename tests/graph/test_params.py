"""Parameters by axis: along which axes of which values a parameter or buffer runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, captured_net, lowered_net
from torch import Tensor, nn

import fxprune
from fxprune.graph import ChannelGraph, ir


def graph_of(net: nn.Module, *inputs: Any) -> ChannelGraph:
    return fxprune.lower(fxprune.capture(net.eval(), inputs))


def uses(graph: ChannelGraph, name: str) -> list[tuple[ir.Op, ir.ParamUse]]:
    return [(op, use) for op in graph.ops for use in op.params if use.name == name]


def only(graph: ChannelGraph, name: str) -> tuple[ir.Op, ir.ParamUse]:
    (found,) = uses(graph, name)
    return found


def test_a_linear_layer() -> None:
    op, weight = only(graph := graph_of(nn.Sequential(nn.Linear(3, 5)), torch.ones(2, 7, 3)), "0.weight")
    assert weight.axes == (ir.AxisUse(op.output.index, (2,)), ir.AxisUse(op.inputs[0].index, (2,)))
    op, bias = only(graph, "0.bias")
    assert bias.axes == (ir.AxisUse(op.output.index, (2,)),)


def test_a_grouped_convolution_repeats_its_second_axis() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False))
    op, weight = only(graph_of(net, torch.ones(2, 4, 5, 5)), "0.weight")
    out, into, *taps = weight.axes
    assert out == ir.AxisUse(op.output.index, (1,))
    assert into == ir.AxisUse(op.inputs[0].index, (1,), (0, 1, 0, 1))
    assert taps == [None, None]
    assert weight.groups == 2


def test_a_grouped_transposed_convolution() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    graph = graph_of(net, torch.ones(2, 4, 5, 5))
    op, weight = only(graph, "0.weight")
    assert weight.axes[0] == ir.AxisUse(op.inputs[0].index, (1,))
    assert weight.axes[1] == ir.AxisUse(op.output.index, (1,), (0, 1, 2, 0, 1, 2))
    assert only(graph, "0.bias")[1].axes == (ir.AxisUse(op.output.index, (1,)),)


def test_a_norm_has_its_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    graph = graph_of(net, torch.ones(2, 3, 5, 5))
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        op, use = only(graph, f"1.{leaf}")
        assert isinstance(op, ir.Norm)
        assert use.axes == (ir.AxisUse(op.output.index, (1,)),)


class Tables(nn.Module):
    """Scales, tables and slopes, moved about before they meet a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.prelu = nn.Linear(4, 6), nn.PReLU(5)
        self.gamma = nn.Parameter(torch.ones(6))
        self.positions = nn.Parameter(torch.ones(1, 5, 6))
        self.packed = nn.Parameter(torch.ones(12))
        self.heads = nn.Parameter(torch.ones(2, 3))
        self.flat = nn.Parameter(torch.ones(6))
        self.mixed = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * self.gamma.view(1, -1).unsqueeze(0).expand(1, 5, 6)
        x = self.prelu(x + self.positions[:, :5].float() * 2)
        scale, shift = self.packed.chunk(2)
        x = x * (1 + scale) + shift.flip(0)
        x = x * self.heads.flatten()
        x = (x.view(-1, 5, 2, 3) * self.flat.view(2, 3)).flatten(2)
        return x * self.mixed.softmax(0).sum(0)


def test_a_parameter_is_followed_through_what_moves_it() -> None:
    graph = graph_of(Tables(), torch.ones(2, 5, 4))

    def axes(name: str) -> tuple[Any, ...]:
        op, use = only(graph, name)
        return tuple(a and (a.value == op.output.index, a.axes, a.index) for a in use.axes)

    assert axes("gamma") == ((True, (2,), None),)
    assert axes("positions") == (None, (True, (1,), None), (True, (2,), None))
    assert axes("prelu.weight") == ((True, (1,), None),)
    assert axes("heads") == ((True, (2,), (0, 0, 0, 1, 1, 1)), (True, (2,), (0, 1, 2, 0, 1, 2)))
    assert axes("flat") == ((True, (2, 3), (0, 1, 2, 3, 4, 5)),)
    assert axes("mixed") == (None, None)
    (scale_op, scale), (shift_op, shift) = uses(graph, "packed")
    assert scale.axes[0] == ir.AxisUse(scale_op.output.index, (2,), (0, 1, 2, 3, 4, 5))
    assert shift.axes[0] == ir.AxisUse(shift_op.output.index, (2,), (11, 10, 9, 8, 7, 6))


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.token = nn.Embedding(9, 4), nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), self.table(x)], 1)


def test_an_embedding_and_a_token() -> None:
    graph = graph_of(Token(), torch.zeros(2, 3, dtype=torch.int64))
    op, table = only(graph, "table.weight")
    assert isinstance(op, ir.Source)
    assert table.axes == (None, ir.AxisUse(op.output.index, (2,)))
    op, token = only(graph, "token")
    assert token.axes == (None, None, ir.AxisUse(op.output.index, (2,)))


class RelativePositions(nn.Module):
    """A table of biases per head, read by a buffer of indices, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(4, 12), nn.Parameter(torch.ones(5, 2))
        self.register_buffer("index", torch.arange(3)[:, None] - torch.arange(3) + 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).unsqueeze(0)
        return (((q @ k.mT) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_table_of_relative_positions() -> None:
    op, table = only(graph := graph_of(RelativePositions(), torch.ones(2, 3, 4)), "table")
    assert op.output.shape == (2, 2, 3, 3)
    rows, heads = table.axes
    assert heads == ir.AxisUse(op.output.index, (1,))
    assert rows == ir.AxisUse(op.output.index, (2, 3), (2, 1, 0, 3, 2, 1, 4, 3, 2))
    assert only(graph, "index")[1].axes == (None, None)


def test_a_packed_projection_of_several_inputs() -> None:
    net = CrossAttention()
    graph = graph_of(net, torch.ones(2, 3, 4), torch.ones(2, 5, 4))
    thirds = [tuple(range(i, i + 4)) for i in (0, 4, 8)]
    for name in ("attention.in_proj_weight", "attention.in_proj_bias"):
        rows = [use.axes[0] for _, use in uses(graph, name)]
        assert [row and row.index for row in rows] == thirds


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return result


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.zeta(self.linear(x), self.scale)


def test_an_unknown_op_names_its_parameters() -> None:
    op, use = only(graph_of(Opaque(), torch.ones(2, 4)), "scale")
    assert isinstance(op, ir.Opaque)
    assert use.axes == (None,)


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_parameter_of_a_network_is_read_somewhere(name: str) -> None:
    read = {use.name for op in lowered_net(name).ops for use in op.params}
    used = {tensor_name for tensor_name, _ in captured_net(name).named_parameters()}
    assert used <= read


def test_functional_layers_are_as_modules() -> None:
    op, weight = only(graph_of(Functional(), torch.ones(2, 4)), "w")
    assert weight.axes == (ir.AxisUse(op.output.index, (1,)), ir.AxisUse(op.inputs[0].index, (1,)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.first = nn.Parameter(torch.ones(3, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.w)


class Positions(nn.Module):
    """Rows of a table that are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(x + self.table(torch.tensor([3, 1, 4])))
        return y


def test_rows_of_a_table_by_the_numbers_that_choose_them() -> None:
    op, use = only(graph_of(Positions(), torch.ones(2, 3, 3)), "table.weight")
    rows, features = use.axes
    assert rows is not None
    assert features is not None
    assert (rows.axes, features.axes) == ((len(op.output.shape) - 2,), (len(op.output.shape) - 1,))
    assert rows.index == (3, 1, 4)
    assert features.index is None


class Permuted(nn.Module):
    """A buffer of whole numbers, turned around before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("bias", torch.arange(1, 5).view(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x) + self.bias.t().flatten())
        return y


def test_a_buffer_of_whole_numbers_is_followed_as_any_other() -> None:
    op, use = only(graph_of(Permuted(), torch.ones(2, 3)), "bias")
    assert all(
        axis is not None and axis.value in (op.output.index, *(v.index for v in op.inputs))
        for axis in use.axes
    )
