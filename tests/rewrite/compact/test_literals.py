"""Sizes and bounds that a network writes down are cut with the channels that they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune

GONE = (0, 3, 4, 6)


class Between(nn.Module):
    """Two linear layers, with ``between`` on the eight channels of the first."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(3, 8), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self.first(x)))
        return y


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "narrow": (lambda y: y.narrow(1, 2, 4), 4),
    "narrow from the end": (lambda y: y.narrow(-1, -5, 4), 4),
    "narrow by name": (lambda y: torch.narrow(y, dim=1, start=2, length=4), 4),
    "select": (lambda y: y.select(1, 5)[:, None], 1),
    "select from the end": (lambda y: y.select(1, -1)[:, None], 1),
    "select by name": (lambda y: torch.select(y, dim=1, index=5)[:, None], 1),
    "unflatten": (lambda y: y.unflatten(1, (8, 1)).squeeze(2), 8),
    "unflatten by name": (lambda y: torch.unflatten(y, dim=-1, sizes=(8, 1))[..., 0], 8),
    "slice": (lambda y: y[:, 1:6], 5),
    "slice to the end": (lambda y: y[..., -3:], 3),
    "slices to half the size": (
        lambda y: torch.cat([-y[..., y.shape[-1] // 2 :], y[:, : y.size(1) // 2]], 1),
        8,
    ),
    "slice with a step of a size": (lambda y: y[:, :: y.shape[1] // 4], 4),
    "narrow by a size": (lambda y: y.narrow(1, y.shape[1] // 4, y.shape[1] // 2), 4),
    "select by a size": (lambda y: y.select(1, y.shape[1] - 3)[:, None], 1),
    "index by a size": (lambda y: y[:, y.shape[1] - 3][:, None], 1),
    "one index": (lambda y: y[:, 5][:, None], 1),
    "split into sizes": (lambda y: y.split([3, 5], 1)[1], 5),
    "split into equal parts": (lambda y: torch.split(y, 4, dim=1)[0], 4),
    "chunk": (lambda y: y.chunk(2, -1)[1], 4),
    "view": (lambda y: y.view(-1, 8).relu(), 8),
    "view as a tuple": (lambda y: y.view((-1, 8)).relu(), 8),
    "reshape": (lambda y: torch.reshape(y, (2, 8)), 8),
    "expand": (lambda y: y[:, None].expand(2, 3, 8).sum(1), 8),
    "expand as a tuple": (lambda y: y[:, None].expand((-1, 3, 8)).sum(1), 8),
    "size in a view": (lambda y: y[:, None].reshape(y.size(0), y.size(1)), 8),
    "divided by a size": (lambda y: y / y.size(1), 8),
    "divided by an entry of the shape": (lambda y: y / y.shape[1], 8),
    "shape in a view": (lambda y: y[:, None].reshape(y.shape[0], y.shape[-1]), 8),
}


@pytest.mark.parametrize("spelling", BETWEEN)
def test_bounds_and_sizes_shrink(spelling: str) -> None:
    torch.manual_seed(0)
    between, width = BETWEEN[spelling]
    model, x = Between(between, width).eval(), torch.randn(2, 3)
    with torch.no_grad():
        model.first.weight[list(GONE)] = 0
        model.first.bias[list(GONE)] = 0
        expected = model(x)
    small = fxprune.compact(model, x)
    with torch.no_grad():
        assert torch.allclose(small(x), expected, atol=1e-6)
        if "size in" in spelling or "shape in" in spelling:
            assert small(torch.randn(5, 3)).shape == (5, 2), "sizes that do not shrink are read as before"
    assert small.get_parameter("first.weight").shape[0] <= 8 - len(GONE)
    assert small.meta["fxprune"]["compaction"].given_back == 0


class Scaled(nn.Module):
    """A vector of scales that is viewed as an image of one pixel, by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale, self.two = (
            nn.Conv2d(3, 6, 1),
            nn.Parameter(torch.rand(6) + 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x) * self.scale.view((6, 1, 1)))


def test_a_vector_that_is_viewed_by_its_size_is_cut() -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 3, 4, 4)
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert dict(small.named_parameters())["scale"].shape[0] < 6
    with torch.no_grad():
        assert torch.allclose(small(x), pruned(x), atol=1e-6)


class Token(nn.Module):
    """A class token as `einops.repeat` adds it: its parameter is viewed by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x)
        token = self.token.reshape(1, 8).unsqueeze(0).expand(x.shape[0], -1, -1)
        y: Tensor = self.last((torch.cat([token, tokens], 1) + self.table.view(1, 6, 1, 8)[:, :, 0]).relu())
        return y


def test_parameters_that_are_viewed_by_their_sizes_are_cut() -> None:
    net, x = Token(), torch.randn(2, 5, 3)
    pruned = fxprune.apply(net, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0, str(table)
    assert small.get_parameter("token").shape[-1] == small.get_parameter("table").shape[-1] < 8
    assert torch.allclose(pruned(x), small(x), atol=1e-6)


class Folded(nn.Module):
    """Groups of channels that are folded into the batch, and taken out of it again."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        b, c = h.shape
        if self.form == "view":
            folded = h.view(b * 4, -1)
        elif self.form == "keyword":
            folded = h.reshape((b * 4, c // 4))
        else:
            folded = h.unflatten(1, (4, 2)).flatten(0, 1)
        folded = folded * folded.amax(1, keepdim=True)
        shape = (b, 4, 2) if self.form != "keyword" else (b, c // 2, 2)
        whole = folded.unflatten(0, (b, 4)) if self.form == "unflatten" else folded.view(*shape)
        y: Tensor = self.last(whole.flatten(1))
        return y


@pytest.mark.parametrize("form", ["view", "keyword", "unflatten"])
def test_sizes_of_samples_times_groups_follow_the_batch(form: str) -> None:
    net, x = Folded(form), torch.randn(2, 3)
    pruned = fxprune.apply(net, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    assert small.get_parameter("first.weight").shape[0] < 8
    for samples in (1, 2, 5):
        others = torch.randn(samples, 3)
        assert torch.allclose(pruned(others), small(others), atol=1e-6)


class Filled(nn.Module):
    """Adds zeros of a size of their own, of which some become a parameter."""

    def __init__(self, place: Any) -> None:
        super().__init__()
        self.layer, self.head, self.place = nn.Linear(6, 8), nn.Linear(8, 3), place
        self.bias = nn.Parameter(torch.rand(4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros(8)
        made[self.place] = self.bias
        return self.head(self.layer(x) + made)


@pytest.mark.parametrize("place", [slice(4), slice(1, None, 2), [0, 2, 5, 6]])
def test_parameters_that_are_written_into_zeros(place: Any) -> None:
    torch.manual_seed(0)
    model, x = Filled(place).eval(), torch.randn(2, 6)
    with torch.no_grad():
        for channel in (0, 5):
            model.layer.weight[channel], model.layer.bias[channel] = 0, 0
    small = fxprune.compact(model, x)
    assert small.layer.weight.shape[0] == 6
    torch.testing.assert_close(small(x), model(x))


class WritesInto(nn.Module):
    """Some channels are written into ones, which then meet all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        made = torch.ones(len(x), 12, dtype=y.dtype)
        made[:, 3:6] = y[:, 3:6]
        out: Tensor = self.last(made + y)
        return out


def test_places_in_a_constant_that_is_picked_later_stay() -> None:
    torch.manual_seed(0)
    net, x = WritesInto().eval(), torch.randn(5, 4)
    gone = [1, 3, 8]
    with torch.no_grad():
        net.first.weight[gone], net.first.bias[gone], net.last.weight[:, gone] = 0.0, 0.0, 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == 10


COUNTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "divided by": lambda last, h: last(h.relu()) / h.numel(),
    "divided by, of one sample": lambda last, h: last(h / h[0].numel()),
    "a size of a view": lambda last, h: last(h.view(h.numel() // 12, 12)),
    "a size beside one that is left open": lambda last, h: last(h.reshape(-1).view(h.nelement() // 12, -1)),
}


@pytest.mark.every_case
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", COUNTS)
def test_numbers_of_entries_stay_what_they_were(kind: str, verify: bool) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12, bias=False), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return COUNTS[kind](self.last, self.first(x))

    torch.manual_seed(0)
    net, x = Counted().eval(), torch.randn(3, 6)
    pruned = fxprune.apply(net, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x, verify=verify)
    assert small.get_parameter("first.weight").shape == (7, 6)
    for batch in (3, 5):
        y = torch.randn(batch, 6)
        torch.testing.assert_close(small(y), pruned(y), rtol=1e-5, atol=1e-6)
