"""Recurrent layers lose whole hidden units, and stay layers of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxprune
from rewrite.compact.masked import assert_compacts, assert_same, outputs, redrawn


class Tagger(nn.Module):
    """A recurrent layer behind a layer, read at every step or at the last one."""

    def __init__(self, kind: Any, last: bool = False, **options: Any) -> None:
        super().__init__()
        self.before, self.rnn = nn.Linear(3, 6), kind(6, 8, **options)
        width = (options.get("proj_size") or 8) * (2 if self.rnn.bidirectional else 1)
        self.after, self.last = nn.Linear(width, 2), last

    def forward(self, x: Tensor) -> Tensor:
        y, final = self.rnn(self.before(x).relu())
        if not self.last:
            return self.after(y)
        final = final[0] if isinstance(final, tuple) else final
        return self.after(torch.cat([final[-2], final[-1]], -1) if self.rnn.bidirectional else final[-1])


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {"batch_first": True}),
    "rnn": (nn.RNN, {"bias": False, "nonlinearity": "relu"}),
    "stack": (nn.LSTM, {"num_layers": 2, "dropout": 0.1}),
    "both ways": (nn.GRU, {"bidirectional": True, "num_layers": 2}),
    "projected": (nn.LSTM, {"proj_size": 4, "bidirectional": True}),
}


@pytest.mark.thinned(4)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_hidden_units_go(kind: str, last: bool) -> None:
    cls, options = KINDS[kind]
    model = redrawn(Tagger(cls, last, **options))
    x = torch.randn(4, 3, 3)
    small = assert_compacts(model, x, 0.5)
    rnn: Any = small.get_submodule("rnn")
    assert type(rnn) is cls
    assert rnn.hidden_size < 8
    assert (
        rnn.weight_hh_l0.shape[0] == rnn.hidden_size * model.get_parameter("rnn.weight_hh_l0").shape[0] // 8
    )
    assert rnn.input_size == small.get_submodule("before").out_features == rnn.weight_ih_l0.shape[1]
    assert_same(
        outputs(small, x[:, :1]),
        [y[:, :1] for y in outputs(small, x)] if not last else outputs(small, x[:, :1]),
    )


def test_a_hidden_unit_is_one_group() -> None:
    model = Tagger(nn.LSTM)
    groups = fxprune.channel_groups(model, torch.randn(4, 1, 3))
    unit = next(
        g for g in groups if any(m.parameter == "rnn.weight_hh_l0" and m.axis == "in" for m in g.members)
    )
    found = {(m.parameter, m.axis): m.indices for m in unit.members}
    gates = (0, 8, 16, 24)
    assert found == {
        ("rnn.weight_ih_l0", "out"): gates,
        ("rnn.weight_hh_l0", "out"): gates,
        ("rnn.weight_hh_l0", "in"): (0,),
        ("after.weight", "in"): (0,),
        ("rnn.bias_ih_l0", 0): gates,
        ("rnn.bias_hh_l0", 0): gates,
    }
    assert unit.removable
    # Four entries of weight_hh are in a row and in the column; 8 biases.
    assert unit.parameters == 4 * 6 + (4 * 8 + 32 - 4) + 2 + 8


class Loop(nn.Module):
    """A cell called step by step; its first state is left out."""

    def __init__(self, kind: Any, steps: int) -> None:
        super().__init__()
        self.before, self.cell, self.after, self.steps = nn.Linear(3, 6), kind(6, 8), nn.Linear(8, 2), steps

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(self.steps):
            state = self.cell(self.before(x[:, step]), state)
        return self.after(state[0] if isinstance(state, tuple) else state)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("steps", [1, 3])
def test_cells(kind: Any, steps: int) -> None:
    small = assert_compacts(redrawn(Loop(kind, steps)), torch.randn(2, 3, 3), 0.5)
    cell: Any = small.get_submodule("cell")
    assert cell.hidden_size == cell.weight_hh.shape[1] < 8


class Started(nn.Module):
    """A first state that code, a parameter or a layer makes."""

    def __init__(self, how: str, layers: int) -> None:
        super().__init__()
        self.how, self.layers = how, layers
        self.rnn, self.after = nn.LSTM(3, 8, layers, batch_first=True), nn.Linear(8, 2)
        self.start = nn.Linear(3, 8 * layers) if how == "layer" else None
        self.table = nn.Parameter(torch.randn(layers, 1, 8)) if how == "parameter" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.start is not None:
            h = self.start(x.mean(1)).tanh().view(-1, self.layers, 8).transpose(0, 1).contiguous()
        elif self.table is not None:
            h = self.table.expand(-1, x.shape[0], -1).contiguous()
        else:
            h = torch.zeros(self.layers, x.size(0), self.rnn.hidden_size, device=x.device)
        y, (last, _) = self.rnn(x, (h, h))
        return self.after(y[:, 0]) + self.after(last[-1])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("how", ["code", "parameter", "layer"])
def test_first_states_lose_the_units_too(how: str, layers: int) -> None:
    x = torch.randn(2, 4, 3)
    small = assert_compacts(redrawn(Started(how, layers)), x, 0.5)
    assert_same(outputs(small, x[:1]), [y[:1] for y in outputs(small, x)])


class Packed(nn.Module):
    """Sequences of several lengths behind a table and a layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.before = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.rnn = nn.LSTM(6, 8, batch_first=True, **options)
        self.after = nn.Linear(16 if self.rnn.bidirectional else 8, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            self.before(self.table(tokens)), lengths, batch_first=True, enforce_sorted=False
        )
        y, (h, _) = self.rnn(packed)
        return self.after(pad_packed_sequence(y, batch_first=True)[0]), h[-1].sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}])
def test_packed_sequences(options: dict[str, Any]) -> None:
    inputs = torch.randint(0, 11, (3, 5)), torch.tensor([5, 2, 3])
    model = redrawn(Packed(**options))
    small = assert_compacts(model, inputs, 0.5)
    others = torch.randint(0, 11, (4, 5)), torch.tensor([1, 5, 4, 4])
    assert [y.shape for y in outputs(small, others)] == [y.shape for y in outputs(model, others)]
    again = fxprune.compact(fxprune.apply(small, "random", 0.5, granularity="channel", progress=False))
    assert again.get_submodule("rnn").weight_hh_l0.numel() < small.get_submodule("rnn").weight_hh_l0.numel()
    assert [y.shape for y in outputs(again, others)] == [y.shape for y in outputs(model, others)]


def test_layers_of_a_stack_keep_equally_many_units() -> None:
    model = redrawn(Tagger(nn.LSTM, num_layers=2))
    with torch.no_grad():  # two units of the first layer, and five of the second, are dead
        for layer, dead in (("l0", [1, 6]), ("l1", [0, 2, 3, 5, 7])):
            rows = [unit + 8 * gate for gate in range(4) for unit in dead]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                model.rnn.get_parameter(f"{name}_{layer}")[rows] = 0
            model.rnn.get_parameter(f"weight_hh_{layer}")[:, dead] = 0
        model.rnn.weight_ih_l1[:, [1, 6]] = 0
        model.after.weight[:, [0, 2, 3, 5, 7]] = 0
    x = torch.randn(4, 1, 3)
    small = fxprune.compact(model, x)
    assert small.get_submodule("rnn").hidden_size == 6
    assert_same(outputs(model, x), outputs(small, x))
    table = {layer.name: layer for layer in small.meta["fxprune"]["compaction"].layers}
    assert table["rnn.weight_hh_l1"].given_back == 4 * 3
    assert "equally many" in table["rnn.weight_hh_l1"].reason


def test_a_direction_that_nothing_reads_keeps_the_width_of_the_other() -> None:
    model = redrawn(Tagger(nn.GRU, bidirectional=True))
    with torch.no_grad():
        model.after.weight[:, 8:] = 0
        model.after.weight[:, :3] = 0
        model.rnn.weight_hh_l0[:, :3] = 0
        model.rnn.weight_hh_l0_reverse.zero_()
    x = torch.randn(4, 1, 3)
    small = fxprune.compact(model, x)
    assert small.get_submodule("rnn").weight_hh_l0_reverse.shape == (3 * 5, 5)
    assert small.get_submodule("rnn").weight_hh_l0.shape == (3 * 5, 5)
    assert_same(outputs(model, x), outputs(small, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning")
def test_the_smaller_layer_trains_saves_and_loads(tmp_path: Path) -> None:
    x = torch.randn(4, 2, 3)
    small = assert_compacts(redrawn(Tagger(nn.LSTM, num_layers=2)), x, 0.5)
    optimizer = torch.optim.Adam(small.parameters(), lr=0.1)
    before = outputs(small, x)
    small.train()(x).square().mean().backward()
    optimizer.step()
    small.eval()
    assert float((outputs(small, x)[0] - before[0]).abs().max()) > 1e-3
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", Tagger(nn.LSTM, num_layers=2).eval())
    assert_same(outputs(loaded, x), outputs(small, x))
    exported = torch.export.export(small, (x,)).module()
    assert torch.allclose(exported(x), small(x), atol=1e-6)
