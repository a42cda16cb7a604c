"""Calls that PyTorch does not report to a mode are part of the graph all the same."""

from __future__ import annotations

import builtins
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture import capture


class Filter(nn.Module):
    """A filter with a kernel that it computes, as a library of signal processing has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.hann_window(5)[None, None])
        self.kernel: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel, padding=2)


class Filters(nn.Module):
    """Makes a module in its forward and moves it to where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Filter().to(x)(self.layer(x))
        return y


def test_modules_that_are_made_in_the_forward_follow_the_input() -> None:
    model, x = Filters(), torch.randn(2, 1, 6)
    gm = capture(model, x)
    assert "meta" not in gm.code
    assert torch.equal(gm(x), model(x))


class Lengths(nn.Module):
    """Reads the batch size by ``len``, of a tensor and of other things, and decides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y) / len(self.layers)
        if len(y) > 100:
            y = 2 * y
        return y.reshape(len(x), -1) * len(y) + len([1, 2])


def test_len_of_a_tensor_leaves_the_batch_size_free() -> None:
    before = builtins.len
    model = Lengths()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = capture(model, torch.ones(2, 4))
    assert builtins.len is before
    for batch in (1, 2, 7):
        x = torch.rand(batch, 4)
        assert torch.equal(gm(x), model(x))
    with pytest.raises(AssertionError):  # twice as much, which the graph does not say
        gm(torch.rand(101, 4))


def test_len_of_a_number_is_an_error_as_ever() -> None:
    class OfNumber(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(x.sum())

    with pytest.raises(ValueError, match="0-d tensor"):
        capture(OfNumber(), torch.ones(2, 4))


class Rounds(torch.autograd.Function):
    """Rounds, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 3 * gradients[0]


rounded = Rounds.apply
table = {"round": Rounds.apply}


class Keeps(nn.Module):
    """Looks an autograd function up before it runs, in one of the places where code keeps functions."""

    static = staticmethod(Rounds.apply)

    def __init__(self, place: str) -> None:
        super().__init__()
        self.first, self.second, self.place = nn.Linear(3, 4), nn.Linear(4, 2), place
        self.own, inner = Rounds.apply, Rounds.apply
        self.closure = lambda x: inner(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.place == "global":
            x = rounded(x)
        elif self.place == "table":
            x = table["round"](x)
        elif self.place == "static":
            x = self.static(x)
        else:
            x = getattr(self, self.place)(x)
        return self.second(x)


@pytest.mark.parametrize("place", ["global", "table", "own", "static", "closure"])
def test_autograd_functions_that_were_looked_up_before_keep_their_gradient(place: str) -> None:
    torch.manual_seed(0)
    model, x = Keeps(place), 3 * torch.randn(5, 3)
    gm = capture(model, x)
    found = []
    for net in (model, gm):
        model.zero_grad()
        net(x).sum().backward()
        found.append(model.first.weight.grad.clone())
    assert torch.equal(*found)
    assert bool(found[0].count_nonzero())
    assert rounded.__self__ is Rounds
    assert type(model.own) is type(rounded)


class KeepsOutOfReach(nn.Module):
    """Looks an autograd function up in a place that cannot be written."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(3, 4), place
        self.part, self.pair = functools.partial(Rounds.apply), (Rounds.apply, 1)

    def forward(self, x: Tensor, given: Any = Rounds.apply) -> Tensor:
        function = {"partial": self.part, "tuple": self.pair[0], "default": given}[self.place]
        return function(self.first(x))


@pytest.mark.parametrize("place", ["partial", "tuple", "default"])
def test_autograd_functions_out_of_reach_are_not_traced_without_their_gradient(place: str) -> None:
    torch.manual_seed(0)
    inner, x = KeepsOutOfReach(place), 3 * torch.randn(5, 3)
    model = nn.Sequential(inner, nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"Rounds\.apply was looked up before it is called"):
        gm = capture(model, x)
    found = []
    for net in (model, gm):
        model.zero_grad()
        net(x).sum().backward()
        found.append(inner.first.weight.grad.clone())
    assert torch.equal(*found)
    assert bool(found[0].count_nonzero())
    assert Rounds.forward(None, torch.tensor(1.4)) == 1.0
