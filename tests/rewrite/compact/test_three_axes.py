"""Parameters with an axis for heads or experts lose slices along their other axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import assert_compacts, assert_same, outputs, redrawn


class Heads(nn.Module):
    """Attention whose projections have an axis for heads and one for their channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.before, self.after = how, nn.Linear(6, 12), nn.Linear(12, 5)
        self.query, self.key, self.value = (nn.Parameter(torch.zeros(12, 3, 4)) for _ in range(3))
        self.out, self.shift = nn.Parameter(torch.zeros(3, 4, 12)), nn.Parameter(torch.zeros(3, 4))

    def project(self, x: Tensor, weight: Tensor, summed: int) -> Tensor:
        if self.how == "tensordot":
            return torch.tensordot(x, weight, dims=summed)
        return torch.einsum("btd,dhk->bthk" if summed == 1 else "bthk,hkd->btd", x, weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        q, k, v = (self.project(x, weight, 1) for weight in (self.query, self.key, self.value))
        scores = torch.einsum("bthk,bshk->bhts", q + self.shift, k) / 2
        return self.after(self.project(torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v), self.out, 2))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("how", ["einsum", "tensordot"])
def test_channels_of_heads_go_in_all_heads(how: str, share: float) -> None:
    model, x = redrawn(Heads(how)), torch.randn(2, 4, 6)
    small = assert_compacts(model, x, share)
    shapes = {name: tuple(small.get_parameter(name).shape) for name in ("query", "key", "value", "out")}
    assert shapes["query"] == shapes["key"]
    assert shapes["query"][1] == shapes["value"][1] == shapes["out"][0] == 3
    assert shapes["value"][2] == shapes["out"][1]


def test_whole_heads_go() -> None:
    model, x = redrawn(Heads("einsum")), torch.randn(2, 4, 6)
    pruned = fxprune.apply(
        model,
        "random",
        0.5,
        granularity="head",
        example_inputs=x,
        progress=False,
        exclude=["before*", "after*"],
    )
    small = fxprune.compact(pruned, x)
    assert small.get_parameter("query").shape[1:] == small.get_parameter("value").shape[1:]
    assert small.get_parameter("query").shape[1] < 3
    assert small.get_parameter("query").shape[2] == 4
    assert_same(outputs(pruned, x), outputs(small, x))


def test_a_head_that_attends_evenly_stays_beside_the_others() -> None:
    """Without queries and keys a head takes the mean; the products must not spread another head's scores."""
    model, x = redrawn(Heads("einsum")), torch.randn(2, 4, 6)
    with torch.no_grad():
        for one in (model.query[:, 0], model.key[:, 0], model.query[:, 1], model.key[:, 1], model.shift[:2]):
            one.zero_()
        model.value[:, 1] = 0
        model.out[1] = 0
    small = fxprune.compact(model, x)
    assert_same(outputs(model, x), outputs(small, x))
    assert small.get_parameter("value").shape == (12, 2, 4)
    assert small.get_parameter("query").shape == (12, 2, 4)
    assert "a head that is used elsewhere" in str(small.meta["fxprune"]["compaction"])


class Experts(nn.Module):
    """Experts in one parameter each for the way up and the way down."""

    def __init__(self, how: str, gate: str) -> None:
        super().__init__()
        self.how, self.gate = how, gate
        self.before, self.router, self.after = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 4)
        width = 10 if gate == "relu" else 20
        self.up, self.down = nn.Parameter(torch.zeros(3, 6, width)), nn.Parameter(torch.zeros(3, 10, 6))
        self.shift, self.last = nn.Parameter(torch.zeros(3, 1, width)), nn.Parameter(torch.zeros(3, 1, 6))

    def product(self, x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        if self.how == "baddbmm":
            return torch.baddbmm(shift, x, weight)
        if self.how == "index":
            return torch.stack([F.linear(x[i], weight[i].t(), shift[i, 0]) for i in range(3)])
        return (torch.einsum("end,edf->enf", x, weight) if self.how == "einsum" else x @ weight) + shift

    def act(self, x: Tensor) -> Tensor:
        if self.gate == "relu":
            return x.relu()
        first, second = x.chunk(2, -1) if self.gate == "halves" else (x[..., ::2], x[..., 1::2])
        return F.silu(first) * second

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        tokens = x.flatten(0, 1)
        hidden = self.act(self.product(tokens.expand(3, -1, -1), self.up, self.shift))
        parts = self.product(hidden, self.down, self.last)
        weights = self.router(tokens).softmax(-1).t().unsqueeze(-1)
        return self.after((parts * weights).sum(0).view_as(x) + x)


@pytest.mark.thinned(4)
@pytest.mark.filterwarnings("ignore:.*of the 690 matrix weights cannot be pruned:UserWarning")
@pytest.mark.parametrize("gate", ["relu", "halves", "steps"])
@pytest.mark.parametrize("how", ["baddbmm", "einsum", "index", "matmul"])
def test_inner_channels_go_in_all_experts(how: str, gate: str) -> None:
    model, x = redrawn(Experts(how, gate)), torch.randn(2, 3, 5)
    small = assert_compacts(model, x, 0.5)
    up, down = small.get_parameter("up"), small.get_parameter("down")
    assert up.shape[0] == down.shape[0] == 3
    assert up.shape[2] == down.shape[1] * (1 if gate == "relu" else 2)
    assert up.shape[1] == down.shape[2] == small.get_submodule("before").out_features


def test_a_channel_of_the_experts_is_one_group() -> None:
    groups = fxprune.channel_groups(Experts("matmul", "halves"), torch.randn(2, 3, 5))
    inner = next(g for g in groups if any(m.parameter == "down" and m.axis == "in" for m in g.members))
    assert {(m.parameter, m.axis): m.indices for m in inner.members} == {
        ("up", "out"): (0, 10), ("down", "in"): (0,), ("shift", 2): (0, 10),
    }  # fmt: skip
    assert inner.parameters == 3 * (2 * 6 + 6 + 2)


class Grouped(nn.Module):
    """Rows in groups, each multiplied with its own expert."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.before, self.after = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.zeros(2, 32, 8)), nn.Parameter(torch.zeros(2, 8, 16))
        self.shift = nn.Parameter(torch.zeros(2, 32))
        self.register_buffer("expert", torch.tensor([0, 0, 1, 1, 1, 1]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.before(self.table(tokens.flatten())).relu()
        order = x.detach().sum(-1).argsort()
        ends = torch.tensor([2, 6], dtype=torch.int32)
        y = torch._grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends)
        expert = (order * 0 + self.expert).sort().values
        first, second = (y + self.shift[expert]).chunk(2, -1)
        return self.after(torch._grouped_mm(F.silu(first) * second, self.down.transpose(-2, -1), offs=ends))


@pytest.mark.slow
def test_grouped_products_keep_a_multiple_of_channels() -> None:
    model, x = redrawn(Grouped()), torch.randint(0, 9, (2, 3))
    options: dict[str, Any] = {"granularity": "channel", "example_inputs": x, "progress": False, "seed": 3}
    for round_to in (1, 4):
        pruned = fxprune.apply(model, "random", 0.6, round_to=round_to, **options)
        small = fxprune.compact(pruned, x)
        table = small.meta["fxprune"]["compaction"]
        assert small.get_parameter("down").shape[2] % 4 == small.get_parameter("down").shape[1] % 4 == 0
        assert small.get_parameter("shift").shape[1] == small.get_parameter("up").shape[1] < 32
        assert (table.given_back == 0) or round_to == 1
        with torch.no_grad():
            assert torch.allclose(pruned.eval()(x), small(x), atol=1e-5)


class NormedHeads(nn.Module):
    """Queries and keys behind a root mean square over the channels of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 12), nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = (self.norm(q) @ self.norm(k).transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def test_norms_over_the_channels_of_heads_lose_channels() -> None:
    model, x = redrawn(NormedHeads()), torch.randn(2, 5, 6)
    small = assert_compacts(model, x, 0.5, "magnitude")
    assert len(small.get_parameter("scale")) < 4


def test_rounding_counts_the_inputs_of_a_layer_behind_a_gate() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 32), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.up(x).chunk(2, -1)
            return self.down(first.sigmoid() * second)

    model, x = redrawn(Gated()), torch.randn(4, 6)
    small = assert_compacts(model, x, 0.4, round_to=4)
    down: Any = small.get_submodule("down")
    assert down.in_features % 4 == 0
    assert down.in_features < 16


def test_regularizers_add_up_groups_of_parameters_of_three_axes() -> None:
    model, x = redrawn(Experts("matmul", "halves")), torch.randn(2, 3, 5)
    penalty = fxprune.regularizer("group-lasso", model, example_inputs=x, strength=1.0)
    groups = [group for group in fxprune.channel_groups(model, x) if group.removable]
    place = next(
        number
        for number, group in enumerate(groups)
        if any(m.parameter == "down" and m.axis == "in" and m.indices == (4,) for m in group.members)
    )
    parts = model.up[:, :, [4, 14]], model.down[:, 4], model.shift[:, :, [4, 14]]
    assert float(penalty.sizes()[place]) == sum(part.numel() for part in parts) == groups[place].parameters


LAYOUTS: dict[str, tuple[tuple[int, ...], Any]] = {
    "an axis of size one": ((1, 6, 8, 3, 3), lambda w: w[0]),
    "taps first": ((3, 3, 8, 6), lambda w: w.permute(3, 2, 0, 1)),
    "transposed, taps first": ((3, 3, 6, 8), lambda w: w.permute(3, 2, 0, 1)),
}


class LaidOut(nn.Module):
    """A convolution with a parameter of its own, stored in some other layout."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.zeros(LAYOUTS[layout][0]))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.stem(x).relu(), LAYOUTS[self.layout][1](self.weight)
        x = F.conv_transpose2d(x, weight) if "transposed" in self.layout else F.conv2d(x, weight, padding=1)
        result: Tensor = self.last(x.relu())
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_lose_channels_in_any_layout(layout: str) -> None:
    model, x = redrawn(LaidOut(layout)), torch.randn(2, 3, 6, 6)
    kernels = fxprune.lower(fxprune.capture(model, x)).kernels["weight"]
    assert (kernels.outputs, kernels.inputs) == (6, 8)
    small = assert_compacts(model, x, 0.5)
    sizes = [sorted(net.get_parameter("weight").shape) for net in (model, small)]
    assert sum(sizes[1]) < sum(sizes[0]) - 1
