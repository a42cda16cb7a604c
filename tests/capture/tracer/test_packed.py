"""Recurrent layers on packed sequences: captured, exact for other lengths, their weights prunable."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower, matrices_outside


class Tagger(nn.Module):
    """Words to tags by way of a recurrent layer that skips the padding; or one class from its last states."""

    def __init__(self, kind: Any, *, tags: bool = True, total: int | None = None, **options: Any):
        super().__init__()
        self.words, self.tags, self.total = nn.Linear(4, 8), tags, total
        self.sorted = options.pop("sorted", False)
        self.rnn = kind(8, 6, **options)
        self.head = nn.Linear(6 * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.rnn.batch_first
        x = torch.relu(self.words(x if first else x.transpose(0, 1)))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=self.sorted)
        out, states = self.rnn(packed)
        if not self.tags:
            last = states[0] if isinstance(states, tuple) else states
            ways = 2 if self.rnn.bidirectional else 1
            result: Tensor = self.head(torch.cat(list(last[-ways:]), -1))
            return result
        padded, _ = pad_packed_sequence(out, batch_first=first, total_length=self.total)
        result = self.head(padded)
        return result


def batch(lengths: list[int], longest: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return torch.randn(len(lengths), longest, 4, generator=generator), torch.tensor(lengths)


NETS: dict[str, dict[str, Any]] = {
    "lstm both ways": {"kind": nn.LSTM, "bidirectional": True, "batch_first": True},
    "gru, steps first": {"kind": nn.GRU, "num_layers": 2},
    "rnn, sorted": {"kind": nn.RNN, "batch_first": True, "sorted": True},
    "last states": {"kind": nn.LSTM, "bidirectional": True, "batch_first": True, "tags": False},
    "projected": {"kind": nn.LSTM, "proj_size": 6, "batch_first": True, "total": 9},
}
NETS["projected"]["hidden"] = 10


def build(name: str) -> Tagger:
    torch.manual_seed(0)
    options = dict(NETS[name])
    hidden = options.pop("hidden", None)
    if hidden is None:
        return Tagger(**options)
    projected = options.pop("proj_size")
    net = Tagger(**options)
    net.rnn = nn.LSTM(8, hidden, proj_size=projected, batch_first=True)
    return net


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", NETS)
def test_packed_sequences_are_traced_and_hold_for_other_lengths(name: str) -> None:
    model = build(name)
    gm = capture(model, batch([7, 5, 2]))
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for training in (False, True):
            copied.train(training), model.train(training)
            for lengths in ([7, 5, 2], [6, 4, 4, 1], [3]):
                assert torch.equal(copied(*batch(lengths)), model(*batch(lengths)))
    graph = lower(gm, strict=True)
    assert not graph.opaque
    assert not matrices_outside(gm, graph)


class Padded(nn.Module):
    """The same layers on sequences without padding, where packing changes nothing."""

    def __init__(self, model: Tagger) -> None:
        super().__init__()
        self.words, self.rnn, self.head = model.words, model.rnn, model.head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.rnn(torch.relu(self.words(x)))[0])
        return result


@pytest.mark.slow
def test_packed_layers_have_the_paths_of_plain_ones() -> None:
    model = build("lstm both ways")
    x, lengths = batch([5, 5], 5)
    masks = [
        fxprune.masks(fxprune.apply(net, "synflow", 0.7, rounds=5, example_inputs=given, progress=False))
        for net, given in ((model, (x, lengths)), (Padded(model), (x,)))
    ]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "synflow", "snip"])
def test_packed_networks_are_pruned_and_trained(method: str) -> None:
    model, given = build("lstm both ways"), batch([7, 5, 2])
    options: dict[str, Any] = {"data": [(given, torch.zeros(3, 7, 3))], "loss_fn": nn.functional.mse_loss}
    options = options if method == "snip" else {}
    pruned = fxprune.apply(model, method, 0.5, example_inputs=given, progress=False, **options)
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        pruned(*given).square().mean().backward()
        optimizer.step()
    fxprune.verify(pruned)
    assert (fxprune.masks(pruned)["rnn.weight_hh_l0"] == 0).any()


def test_a_list_of_sequences_is_packed() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            packed: PackedSequence = self.rnn(pack_sequence([first, second], enforce_sorted=False))[0]
            result: Tensor = self.head(pad_packed_sequence(packed)[0])
            return result

    model = Lists()
    given = torch.randn(3, 4), torch.randn(5, 4)
    gm = capture(model, given)
    assert torch.equal(gm(*given), model(*given))
    assert not lower(gm, strict=True).opaque
