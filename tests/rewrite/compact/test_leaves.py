"""Modules that capture keeps whole are opened where channels inside of them go."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import one_in
from torch import Tensor, fx, nn

import fxprune
from rewrite.compact.masked import assert_same, outputs, redrawn

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention and a feed-forward layer, with sizes written in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) * 0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], -1, 8))
        out: Tensor = self.norm(x + self.second(self.first(x).relu()))
        return out


class LayerDrop(nn.Module):
    """Blocks that training passes over at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand([]) < 0.1:
                continue
            x = block(x)
        return x


class Positions(nn.Module):
    """Keeps a table that it computes for the length of its input, as convit does."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block, self.position = Block(), nn.Linear(1, 8)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1]).to(x.dtype)[:, None] / x.shape[1]
        out: Tensor = self.block(x + self.position(self.table))
        return out


class Filled(Positions):
    """Fills its table by entries, after the block has run once."""

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            table = torch.zeros(x.shape[1], 1)
            table[:, 0] = torch.arange(x.shape[1]) / x.shape[1]
            self.table = table.to(x.dtype)
        out: Tensor = self.block(self.block(x) + self.position(self.table))
        return out


class Chooses(nn.Module):
    """Computes what some entries ask for, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., :1] > 0
        return x + mask * self.second(self.first(x).relu()) if mask.any() else x


class Narrow(nn.Module):
    """Two layers, and a counter that tests' classes write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls: Any = 0


class Counts(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.calls += 1
        out: Tensor = self.second(hidden) * self.calls
        return out


class Averages(Narrow):
    """Adds a mean that goes on from one call to the next."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.calls = self.calls * 0.9 + hidden.mean((0, 1))
        out: Tensor = self.second(hidden + self.calls)
        return out


class MadeOnce(Narrow):
    """Makes its table for the length of the first input, and takes it for all others."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.calls, int):
            self.calls = torch.arange(x.shape[1]).to(x.dtype).sum()
        out: Tensor = self.second(self.first(x).relu()) * self.calls
        return out


class CountsTraining(Narrow):
    """Evaluates by how often it was trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        out: Tensor = self.second(self.first(x).relu()) * (1 + self.calls)
        return out


class CountsDraws(CountsTraining):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + 0 * random.random())
        return super().forward(x)


class OwnCounter(Narrow):
    """Computes with what it counts in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            x = x / self.calls
        out: Tensor = self.second(self.first(x).relu())
        return out


class OneBatch(Narrow):
    """Multiplies by the size of the batch, and by a number that a graph cannot draw."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * random.random()
        out: Tensor = self.second(self.first(x).relu()) * self.size(x)
        return out

    def size(self, x: Tensor) -> float:
        return len(range(x.shape[0]))


class OneBatchAsFloat(OneBatch):
    def size(self, x: Tensor) -> float:
        return float(x.shape[0])


class Asserts(OneBatch):
    """Checks sizes, and takes every batch."""

    def size(self, x: Tensor) -> float:
        assert x.dim() == 3
        assert x.shape[-1] == 8
        return 2.0


class Around(nn.Module):
    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.head = nn.Linear(6, 8), inner(), inner(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.other(self.one(self.stem(x))))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("inner", one_in(3, [LayerDrop, Positions, Filled]))
def test_channels_go_in_a_module_that_no_graph_does_in_training(
    inner: type[nn.Module], tmp_path: Path
) -> None:
    model = redrawn(Around(inner))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="kept whole"):
        pruned = fxprune.apply(model, "random", 0.5, granularity="channel", example_inputs=X, progress=False)
    with pytest.warns(UserWarning, match=f"{inner.__name__} was kept whole, and is a graph now"):
        small = fxprune.compact(pruned, X)
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0, str(table)
    sizes = {name: parameter.numel() for name, parameter in small.named_parameters()}
    assert all(sizes[name] == int(mask.sum()) for name, mask in fxprune.masks(pruned).items())
    for batch in (X, torch.cat([X, -X])):
        assert_same(outputs(pruned, batch), outputs(small, batch))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    small.train()(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxprune.save(small, tmp_path / "small.safetensors")
        again = fxprune.load(tmp_path / "small.safetensors", Around(inner), example_inputs=X)
    assert_same(outputs(small.eval(), X), outputs(again.eval(), X))


def test_a_table_that_a_module_keeps_is_no_part_of_the_trials() -> None:
    model = redrawn(Around(Positions))
    with pytest.warns(UserWarning, match="kept whole"):
        gm = fxprune.capture(model, X)
    fxprune.compact(gm, X)
    assert model.get_buffer("one.table").shape == (1, 1)
    assert gm.get_buffer("one.table").shape == (1, 1)


def test_a_module_that_asks_for_any_entry_stays_a_call_with_smaller_layers() -> None:
    model = redrawn(Around(Chooses))
    with pytest.warns(UserWarning, match="kept whole"):
        pruned = fxprune.apply(model, "random", 0.5, granularity="channel", example_inputs=X, progress=False)
    small = fxprune.compact(pruned, X)
    assert isinstance(small.get_submodule("one"), Chooses)
    assert "one" in {node.target for node in small.graph.nodes}
    assert small.get_parameter("one.first.weight").shape[0] < 16
    for batch in (X, -X, X + 20, X - 20):
        assert_same(outputs(pruned, batch), outputs(small, batch))


def test_a_layer_that_reads_what_another_gives_is_opened_after_it() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.MultiheadAttention(8, 2, batch_first=True)
            self.two = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.two(self.one(x, x, x, need_weights=False)[0]).mean(1))
            return out

    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(4, 5, 8)
    weight, bias = model.one.in_proj_weight, model.one.in_proj_bias
    with torch.no_grad():
        model.two.linear1.weight[:4], model.two.linear1.bias[:4] = 0.0, 0.0
        for head in (0, 4):
            for first in (head, 8 + head, 16 + head):
                weight[first : first + 2], bias[first : first + 2] = 0.0, 0.0
            model.one.out_proj.weight[:, head : head + 2] = 0.0
    small = fxprune.compact(model, x)
    assert len(small.get_parameter("two.linear1.weight")) == 12
    assert len(small.get_parameter("one.in_proj_weight")) == 12
    assert torch.allclose(small(x), model(x), atol=1e-6)


def _half(inner: type[nn.Module]) -> fx.GraphModule:
    """A network around two modules of a class, with half of the channels masked."""
    with pytest.warns(UserWarning, match="kept whole"):
        return fxprune.apply(
            redrawn(Around(inner)), "random", 0.5, granularity="channel", example_inputs=X, progress=False
        )


@pytest.mark.thinned(5)
@pytest.mark.parametrize("inner", [Counts, Averages, MadeOnce, CountsTraining, CountsDraws])
def test_a_module_that_goes_on_from_its_last_call_stays_whole(inner: type[nn.Module]) -> None:
    pruned = _half(inner)
    small = fxprune.compact(pruned, X)
    assert isinstance(small.get_submodule("one"), inner)
    assert "one" in {node.target for node in small.graph.nodes}
    is_narrow = small.get_parameter("one.first.weight").shape[0] < 16
    assert is_narrow == (inner is not Counts), "of Counts there is no graph to compare with"
    for length, mode in ((5, False), (5, False), (4, False), (5, True), (5, True), (5, False)):
        with torch.no_grad():
            assert_same([pruned.train(mode)(X[:, :length])], [small.train(mode)(X[:, :length])])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("inner", [OneBatch, OneBatchAsFloat])
def test_a_module_whose_graph_takes_one_batch_size_stays_a_call(inner: type[nn.Module]) -> None:
    pruned = _half(inner)
    small = fxprune.compact(pruned, X)
    assert isinstance(small.get_submodule("one"), inner)
    assert small.get_parameter("one.first.weight").shape[0] < 16
    for batch in (X, X[:1], torch.cat([X, -X])):
        assert_same(outputs(pruned, batch), outputs(small, batch))


def test_a_module_that_checks_sizes_is_opened() -> None:
    pruned = _half(Asserts)
    with pytest.warns(UserWarning, match="Asserts was kept whole, and is a graph now"):
        small = fxprune.compact(pruned, X)
    assert small.get_parameter("one.first.weight").shape[0] < 16
    for batch in (X, X[:1], torch.cat([X, -X])):
        assert_same(outputs(pruned, batch), outputs(small, batch))


def test_the_warning_says_what_training_does_no_more() -> None:
    pruned = _half(OwnCounter)
    told = (
        "OwnCounter was kept whole, and is a graph now: its forward writes its attribute 'calls' in training;"
    )
    with pytest.warns(UserWarning, match=f"{told} the graph does not"):
        small = fxprune.compact(pruned, X)
    assert small.get_parameter("one.first.weight").shape[0] < 16
    for _ in range(2):
        small.train()(X)
    assert small.get_submodule("one").calls == 0
    assert_same(outputs(pruned, X), outputs(small, X))


@pytest.mark.slow
def test_a_warning_points_to_the_line_that_asked_for_the_network() -> None:
    with pytest.warns(UserWarning, match="kept whole") as captured:
        gm = fxprune.capture(redrawn(Around(LayerDrop)), X)
    with pytest.warns(UserWarning, match="kept whole") as applied:
        pruned = fxprune.apply(
            redrawn(Around(LayerDrop)), "random", 0.5, granularity="channel", example_inputs=X, progress=False
        )
    with pytest.warns(UserWarning, match="is a graph now") as compacted:
        fxprune.compact(pruned, X)
    assert gm is not pruned
    for found in (captured, applied, compacted):
        assert {Path(warning.filename).name for warning in found} == {"test_leaves.py"}


class Counts(nn.Module):
    """Counts its calls in a buffer, in a list and in a number, and goes by the numbers of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log, self.number = nn.Linear(8, 8), [0], 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(1)
        self.number += 1
        out: Tensor = self.layer(x + 1 if x.sum().item() > 0 else x)
        return out


def test_trials_leave_no_trace_in_the_compact_network() -> None:
    model = redrawn(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), Counts(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = 0.0, 0.0
    with pytest.warns(UserWarning, match="kept whole"):
        small = fxprune.compact(model, X)
    assert len(small.get_parameter("0.weight")) == 5
    for network in (model, small):
        part: Any = network.get_submodule("3")
        assert (float(part.count), part.log, part.number) == (0.0, [0], 0)


class Scaled(Narrow):
    """Is given a length, and draws a number that no graph can draw."""

    def forward(self, x: Tensor, length: int) -> Tensor:
        if self.training:
            x = x * random.random()
        out: Tensor = self.second(self.first(x).relu()) / length
        return out


class GivesLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.head = nn.Linear(6, 8), Scaled(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(self.stem(x), x.shape[1]))
        return out


def test_a_module_that_is_given_sizes_stays_one_for_all_sizes() -> None:
    with pytest.warns(UserWarning, match="kept whole"):
        pruned = fxprune.apply(
            redrawn(GivesLength()), "random", 0.5, granularity="channel", example_inputs=X, progress=False
        )
    small = fxprune.compact(pruned, X)
    assert isinstance(small.get_submodule("one"), Scaled)
    assert small.get_parameter("one.first.weight").shape[0] < 16
    for batch in (X, X[:, :2], torch.cat([X, X], 1)):
        assert_same(outputs(pruned, batch), outputs(small, batch))


class CopiesIn(nn.Module):
    """Writes its input into a larger batch, whose name nobody reads after a call of a module kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.head = nn.Linear(6, 8), Positions(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.new_zeros(x.shape[0], x.shape[1] + 2, x.shape[2])
        batch[:, : x.shape[1]].copy_(x)
        out: Tensor = self.head(self.one(self.stem(batch)))
        return out


@pytest.mark.slow
def test_writes_elsewhere_stay_where_a_module_is_opened() -> None:
    with pytest.warns(UserWarning, match="kept whole"):
        pruned = fxprune.apply(
            redrawn(CopiesIn()), "random", 0.5, granularity="channel", example_inputs=X, progress=False
        )
    with pytest.warns(UserWarning, match="Positions was kept whole, and is a graph now"):
        small = fxprune.compact(pruned, X, verify=False)
    assert small.get_parameter("one.block.first.weight").shape[0] < 16
    assert_same(outputs(pruned, X), outputs(small, X))
