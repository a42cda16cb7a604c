"""Recurrent layers and cells, against the oracle and against loops written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import effective_parameters, random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.paths.count import reach
from lowering.agreement import assert_flow, assert_reach, lowered


def scan(model: nn.Module, example: Tensor) -> Tensor:
    """Find the input steps that the second output step sees."""
    graph = lowered(model, example)
    return reach(graph, {})["mix.weight"].any(1)


class Second(nn.Module):
    """One weight per pair of steps, a recurrence, its second step."""

    def __init__(self, inner: nn.Module, time: int = 1) -> None:
        super().__init__()
        self.mix, self.inner, self.time = nn.Linear(3, 3, bias=False), inner, time

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        y, _ = self.inner(x if self.time == 1 else x.transpose(0, 1))
        return y.select(self.time, 1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("time", [0, 1])
def test_recurrence_reaches_forward_in_time(kind: Any, time: int) -> None:
    model = Second(kind(2, 4, batch_first=time == 1), time)
    assert scan(model, torch.ones(1, 3, 2)).tolist() == [True, True, False]
    both = Second(kind(2, 4, batch_first=time == 1, bidirectional=True), time)
    assert scan(both, torch.ones(1, 3, 2)).tolist() == [True, True, True]
    deep = Second(kind(2, 4, num_layers=2, batch_first=time == 1, bias=False), time)
    assert scan(deep, torch.ones(1, 3, 2)).tolist() == [True, True, False]


class Net(nn.Module):
    """A recurrent layer between two layers, called, or written out as a loop (``by_hand``)."""

    def __init__(
        self, kind: Any, by_hand: bool, last: bool = False, state: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(4, 5, bias=False), kind(5, 6, **options)
        width = (options.get("proj_size") or 6) * (1 + self.inner.bidirectional)
        self.after, self.by_hand, self.last = nn.Linear(width, 3, bias=False), by_hand, last
        self.start = nn.Linear(4, width * self.inner.num_layers, bias=False) if state else None

    def forward(self, x: Tensor) -> Tensor:
        first = None
        if self.start is not None:
            rows = self.inner.num_layers * (1 + self.inner.bidirectional)
            first = self.start(x[:, 0]).unflatten(-1, (rows, -1)).transpose(0, 1)
        is_lstm = isinstance(self.inner, nn.LSTM)
        x = self.before(x).transpose(0, 1)
        if self.by_hand:
            y, final = loop(self.inner, x, first)
        else:
            y, final = self.inner(x, (first, first) if is_lstm and first is not None else first)
            final = final[0] if is_lstm else final
        return self.after(final.transpose(0, 1).flatten(1) if self.last else y)


def loop(m: Any, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """A layer of any kind, one step after the other, time first."""
    finals = []
    for layer in range(m.num_layers):
        outputs = []
        for backwards in range(1 + m.bidirectional):
            suffix = f"_l{layer}{'_reverse' if backwards else ''}"
            own = {name: getattr(m, name + suffix, None) for name in
                   ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}  # fmt: skip
            wide = getattr(m, "proj_size", 0) or m.hidden_size
            h = x.new_zeros(x.shape[1], wide) if first is None else first[len(finals)]
            c = x.new_zeros(x.shape[1], m.hidden_size) if first is None else h
            steps = []
            for step in reversed(list(x.unbind(0))) if backwards else x.unbind(0):
                h, c = one_step(m, own, step, h, c)
                steps.append(h)
            finals.append(h)
            outputs.append(torch.stack(steps[::-1] if backwards else steps))
        x = torch.cat(outputs, -1)
    return x, torch.stack(finals)


def one_step(m: Any, own: dict[str, Any], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    taken, fed = F.linear(x, own["weight_ih"], own["bias_ih"]), F.linear(h, own["weight_hh"], own["bias_hh"])
    if isinstance(m, (nn.LSTM, nn.LSTMCell)):
        i, f, g, o = (taken + fed).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if own.get("weight_hr") is None else F.linear(h, own["weight_hr"])), c
    if isinstance(m, (nn.GRU, nn.GRUCell)):
        (r, z, n), (hr, hz, hn) = taken.chunk(3, -1), fed.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        return (1 + -z) * (n + r * hn).tanh() + z * h, c
    return (taken + fed).tanh(), c


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, deep, both ways, no bias": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "bias": False}),
    "lstm, projected": (nn.LSTM, {"proj_size": 3, "bias": False}),
    "lstm, last state": (nn.LSTM, {"last": True, "bias": False}),
    "lstm, given state": (nn.LSTM, {"state": True, "bias": False}),
    "gru": (nn.GRU, {"bias": False}),
    "gru, both ways, last state": (nn.GRU, {"bidirectional": True, "last": True}),
    "gru, given state": (nn.GRU, {"state": True, "num_layers": 1, "bias": False}),
    "rnn": (nn.RNN, {"num_layers": 2, "bias": False}),
    "rnn, both ways, given state": (nn.RNN, {"bidirectional": True, "state": True}),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_its_loop(name: str) -> None:
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    model, by_hand = Net(kind, False, **options), Net(kind, True, **options)
    if options.get("last"):
        for net in (model, by_hand):
            net.after = nn.Linear(6 * (1 + net.inner.bidirectional), 3, bias=False)
    example = torch.randn(2, 4, 4)
    graph = lowered(model, example)
    assert {name for name, p in model.named_parameters() if p.dim() > 1} == set(graph.kernels)
    for seed, density in enumerate((0.8, 0.35)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, by_hand, example, masks, periodic=False)
        if seed:
            assert_flow(graph, by_hand, example, masks, derivatives=True)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell_is_its_step(kind: Any) -> None:
    class Stepped(nn.Module):
        def __init__(self, by_hand: bool) -> None:
            super().__init__()
            self.inner, self.after, self.by_hand = kind(4, 5), nn.Linear(5, 2, bias=False), by_hand

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(x.shape[0], 5)
            own = dict(self.inner.named_parameters())
            for step in x.unbind(1):
                if self.by_hand:
                    h, c = one_step(self.inner, own, step, h, c)
                elif kind is nn.LSTMCell:
                    h, c = self.inner(step, (h, c))
                else:
                    h = self.inner(step, h)
            return self.after(h)

    model, example = Stepped(False), torch.randn(2, 3, 4)
    graph = lowered(model, example)
    masks = random_masks(model, 0.4, 0, graph.kernels)
    assert_reach(graph, Stepped(True), example, masks)
    assert_flow(graph, Stepped(True), example, masks)


def test_long_sequences_lose_no_weight() -> None:
    """Longer than the passes: what a loop of few steps uses is used, and what nobody reaches is not."""
    torch.manual_seed(0)
    model, by_hand = Net(nn.LSTM, False, bias=False), Net(nn.LSTM, True, bias=False)
    graph = lowered(model, torch.randn(2, 30, 4))
    masks = random_masks(model, 0.3, 1, graph.kernels)
    masks["inner.weight_ih_l0"][:, :2] = False
    found, want = reach(graph, masks), effective_parameters(by_hand, torch.randn(2, 30, 4), masks)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_macs_count_each_step_once() -> None:
    graph = lowered(Net(nn.LSTM, False), torch.randn(2, 30, 4))
    assert graph.kernels["inner.weight_hh_l0"].macs == 30 * 24 * 6
    assert graph.kernels["inner.weight_ih_l0"].macs == 30 * 24 * 5
