"""Means and lengths over channels: channels that are zero go, and the result is that of the old width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.rewrite.compact.replay import replay
from rewrite.compact.masked import assert_compacts


class Net(nn.Module):
    """Ten channels, and what ``kind`` makes of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.other, self.last = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(10, 3)
        self.one = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        if self.kind == "mean":
            return torch.cat([self.one(y.mean(-1, keepdim=True)), self.last(self.other(x))], -1)
        if self.kind == "mean_of_two":
            return self.last(y) + y.mean(dim=(1, 2))[:, None, None]
        if self.kind == "length":
            return self.last(F.normalize(y, dim=-1))
        q, k = F.normalize(y, dim=-1), F.normalize(self.other(x), dim=-1)
        return q @ k.transpose(1, 2)


KINDS = ["mean", "mean_of_two", "length", "cosine"]


def drawn(kind: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(kind).eval(), torch.randn(2, 5, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_channels_go(kind: str) -> None:
    net, x = drawn(kind)
    with torch.no_grad():
        for layer in (net.first, net.other):
            layer.weight[[0, 3, 4]], layer.bias[[0, 3, 4]] = 0.0, 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    torch.testing.assert_close(small(2 * x[:1]), net(2 * x[:1]))
    assert len(small.get_parameter("first.weight")) == 7
    assert small.meta["fxprune"]["compaction"].given_back == 0


@pytest.mark.parametrize("kind", KINDS)
def test_constant_channels_stay(kind: str) -> None:
    net, x = drawn(kind)
    with torch.no_grad():
        net.first.weight[[0, 3, 4]], net.first.bias[[0, 3, 4]] = 0.0, 0.5
        net.other.weight[[0, 3, 4]], net.other.bias[[0, 3, 4]] = 0.0, 0.5
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == 10
    reason = next(layer.reason for layer in small.meta["fxprune"]["compaction"].layers if layer.given_back)
    assert "not zero" in reason or "no constant" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_are_pruned_all_go(kind: str) -> None:
    net, x = drawn(kind)
    pruned = fxprune.apply(net, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    torch.testing.assert_close(small(x), pruned(x))
    assert len(small.get_parameter("first.weight")) < 10
    assert small.meta["fxprune"]["compaction"].given_back == 0


def test_a_norm_written_by_hand_loses_channels() -> None:
    """It subtracts a mean over all of them, and its variance counts those that are zero."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y - y.mean(-1, keepdim=True)
            out: Tensor = self.last(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5))
            return out

    torch.manual_seed(0)
    net, x = Centred().eval(), torch.randn(2, 4)
    with torch.no_grad():
        net.first.weight[:3], net.first.bias[:3], net.last.weight[:, :3] = 0.0, 0.0, 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == 7


def centred_by_spread(y: Tensor) -> Tensor:
    u = y.mean(1, keepdim=True)
    return (y - u) / (y.std(1, keepdim=True) + 1e-3)


def centred_by_moments(y: Tensor) -> Tensor:
    variance, mean = torch.var_mean(y, 1, keepdim=True, unbiased=False)
    return (y - mean) * torch.rsqrt(variance + 1e-5)


def centred_by_squares(y: Tensor) -> Tensor:
    u = y.mean(1, keepdim=True)
    return (y - u) / torch.sqrt((y - u).pow(2).mean(1, keepdim=True) + 1e-5)


def centred_late(y: Tensor) -> Tensor:
    u = y.mean(1, keepdim=True)
    s = ((y - u) ** 2).mean(1, keepdim=True)
    return 2.0 * (y - u) / torch.sqrt(s + 1e-5)


def scaled_alone(y: Tensor) -> Tensor:
    return y / torch.sqrt(y.var(1, keepdim=True, unbiased=False) + 1e-5)


def centred_along_an_axis(y: Tensor) -> Tensor:
    """By the names of another library."""
    variance = y.var(axis=1, keepdim=True)  # type: ignore[call-overload]
    return (y - y.mean(axis=1, keepdim=True)) / torch.sqrt(variance + 1e-5)  # type: ignore[no-any-return, call-overload]


CENTRED = [
    centred_along_an_axis,
    centred_by_spread,
    centred_by_moments,
    centred_by_squares,
    centred_late,
    scaled_alone,
]


class Centred(nn.Module):
    """A norm over channels that is written by hand, with a scale and a shift, before a layer."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.last = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 2, 1)
        self.gain, self.shift = nn.Parameter(torch.rand(10)), nn.Parameter(torch.rand(10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        out: Tensor = self.last(self.gain[:, None, None] * y + self.shift[:, None, None])
        return out


@pytest.mark.parametrize("norm", CENTRED, ids=lambda norm: norm.__name__)
def test_centred_norms_by_hand_lose_channels(norm: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x = Centred(norm).eval(), torch.randn(2, 3, 6, 6)
    small = assert_compacts(net, x, 0.5)
    assert len(small.get_parameter("first.weight")) < 7
    larger = torch.randn(1, 3, 9, 9)
    again = replay(fxprune.capture(net, x), small.meta["fxprune"]["recipes"][0])
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(larger), small(larger))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_sums_go_with_all_their_terms(axis: int, reduce: str) -> None:
    """Constants in the terms do not matter: nothing of these sums is read."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 12), nn.Linear(3 if axis == -1 else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = getattr(self.first(x).unflatten(-1, (3, 4)), reduce)(axis)
            out: Tensor = self.last(y)
            return out

    torch.manual_seed(0)
    net, x = Parts().eval(), torch.randn(2, 4)
    with torch.no_grad():
        net.last.weight[:, 1] = 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == (8 if axis == -1 else 9)
    assert small.meta["fxprune"]["compaction"].given_back == 0


class ByHand(nn.Module):
    """A norm written by hand: by the root of a mean square, or by the mean of the lengths of all channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 2, 1)
        self.gain = nn.Parameter(torch.rand(1, 10, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.first(x))
        if self.kind == "rms":
            z = y * torch.rsqrt(y.float().pow(2).mean(1, keepdim=True) + 1e-5)
        else:
            length = y.norm(p=2, dim=(2, 3), keepdim=True)
            z = y * (length / (length.mean(dim=1, keepdim=True) + 1e-6))
        out: Tensor = self.last(y + z * self.gain)
        return out


@pytest.mark.parametrize("kind", ["rms", "response"])
def test_norms_by_hand_lose_channels_that_are_zero(kind: str) -> None:
    torch.manual_seed(0)
    net, x = ByHand(kind).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        net.first.weight[[0, 3, 4]], net.first.bias[[0, 3, 4]] = 0.0, 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    larger = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(small(larger), net(larger))
    assert len(small.get_parameter("first.weight")) == 7
    assert small.meta["fxprune"]["compaction"].given_back == 0


@pytest.mark.parametrize(
    "norm", ["rms", "response", *CENTRED], ids=lambda norm: getattr(norm, "__name__", norm)
)
def test_norms_by_hand_keep_channels_that_count(norm: Any) -> None:
    """A constant is no zero, and counts in a mean."""
    torch.manual_seed(0)
    net: Any = ByHand(norm) if isinstance(norm, str) else Centred(norm)
    net, x = net.eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        net.first.weight[[0, 3, 4]], net.first.bias[[0, 3]], net.first.bias[4] = 0.0, 0.5, 0.0
        net.last.weight[:, [0, 3, 4]] = 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == 9


def test_recipes_of_scaled_means_are_followed() -> None:
    torch.manual_seed(0)
    net, x = ByHand("response").eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        net.first.weight[[0, 3, 4]], net.first.bias[[0, 3, 4]] = 0.0, 0.0
    small = fxprune.compact(net, x)
    (recipe,) = small.meta["fxprune"]["recipes"]
    assert recipe.unwritable == ""
    again = replay(fxprune.capture(net, x), recipe)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), net(x))


EXTREMES = {
    "amax": lambda y: y.amax(-1, keepdim=True),
    "amin": lambda y: y.amin(-1, keepdim=True),
    "max": lambda y: y.max(-1, keepdim=True)[0],
    "min": lambda y: torch.min(y, dim=-1, keepdim=True).values,
}


class Extreme(nn.Module):
    def __init__(self, kind: str, sign: float, places: bool) -> None:
        super().__init__()
        self.kind, self.sign, self.places = kind, sign, places
        self.first, self.last, self.one = nn.Linear(4, 10), nn.Linear(10, 3), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu() * self.sign
        out: Tensor = self.last(y) + self.one(EXTREMES[self.kind](y))
        return out + y.max(-1)[1][..., None] if self.places else out


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_zero_that_went_is_the_largest_or_smallest_as_before(kind: str, sign: float) -> None:
    torch.manual_seed(0)
    net, x = Extreme(kind, sign, False).eval(), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.first.bias += 9.0  # no other channel is zero
        net.first.weight[:4], net.first.bias[:4] = 0.0, 0.0
    small = fxprune.compact(net, x)
    assert small.get_parameter("first.weight").shape == (6, 4)
    torch.testing.assert_close(small(x), net(x))
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0
    again = replay(fxprune.capture(net, x), small.meta["fxprune"]["recipes"][0], x)
    assert str(again.code) == str(small.code)


def test_channels_whose_places_are_asked_for_stay() -> None:
    torch.manual_seed(0)
    net, x = Extreme("amax", 1.0, True).eval(), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.first.weight[:4], net.first.bias[:4] = 0.0, 0.0
    small = fxprune.compact(net, x)
    assert small.get_parameter("first.weight").shape == (10, 4)
    torch.testing.assert_close(small(x), net(x))


class Weighed(nn.Module):
    """The largest channel of every token goes through a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = torch.softmax(y.amax(2), 1)[:, None] @ self.last(y)
        return out


def test_a_constant_that_may_be_the_largest_stays() -> None:
    torch.manual_seed(0)
    net, x = Weighed().eval(), torch.randn(4, 5, 6)
    with torch.no_grad():
        net.first.weight.mul_(5)
        net.first.weight[1], net.first.bias[1] = 0.0, 1.0
    small = fxprune.compact(net, x)
    some = torch.cat([x[:, :3], 0 * x[:, 3:]], 1)  # where no other channel is large
    torch.testing.assert_close(small(some), net(some))


WHOLE_NUMBERS = {
    "largest": lambda y: (10 * y).int().amax(1),
    "smallest": lambda y: (10 * y).int().amin(1),
    "with its place": lambda y: (10 * y).long().max(1)[0],
    "of all": lambda y: (10 * y).long().max(),
    "any": lambda y: (y > 0).amax(1),
    "every": lambda y: (y >= 0).amin(1),
}


@pytest.mark.parametrize("kind", sorted(WHOLE_NUMBERS))
def test_extremes_of_whole_numbers_stay_whole(kind: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.last(y), WHOLE_NUMBERS[kind](y)

    torch.manual_seed(0)
    net, x = Counts().eval(), torch.randn(16, 6)
    with torch.no_grad():
        net.first.weight[[1, 5]], net.first.bias[[1, 5]] = 0.0, 0.0
    small = fxprune.compact(net, x)
    wanted, found = net(x)[1], small(x)[1]
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert len(small.get_parameter("first.weight")) == (8 if kind == "every" else 6)


def test_variances_in_half_precision_are_numbers() -> None:
    """The square of the mean of what is left is too large for it, and the variance is not."""
    torch.manual_seed(0)
    net, x = Centred(scaled_alone).eval(), torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        net.first.bias.fill_(300.0)
        net.first.weight[:3], net.first.bias[:3], net.last.weight[:, :3] = 0.0, 0.0, 0.0
    small = fxprune.compact(net, x)
    assert len(small.get_parameter("first.weight")) < 10
    torch.testing.assert_close(small.half()(x.half()).float(), net(x), rtol=0.05, atol=0.05)
