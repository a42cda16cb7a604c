"""Networks of well-known kinds: channels go at random, and all that went with them is gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import Cases, adder, assert_compacts, redrawn

CASES: Cases = {}
case = adder(CASES)


@case(lambda: torch.randn(2, 3, 2, 6, 6))
class TwoStates(nn.Module):
    """Two convolutional LSTMs, the second of which reads the first beside its own first state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], 6, *x.shape[3:])
        states, ys = [(zeros, zeros), (zeros, zeros)], []
        for t in range(x.shape[1]):
            below = x[:, t]
            for layer, gates in enumerate((self.first, self.second)):
                h, c = states[layer]
                i, f, o, new = gates(torch.cat([below, h], 1)).split(6, 1)
                c = f.sigmoid() * c + i.sigmoid() * new.tanh()
                below = o.sigmoid() * c.tanh()
                states[layer] = below, c
            ys.append(self.out(below))
        return torch.stack(ys, 1)


@case(lambda: torch.randn(2, 3, 8, 8))
class FilledUp(nn.Module):
    """Shortcuts that get channels of zeros, before and behind, as in residual networks of 2015."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.two, self.three = nn.Conv2d(12, 17, 3, padding=1, stride=2), nn.Conv2d(17, 17, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(17), nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + F.pad(x, (0, 0, 0, 0, 2, 2))).relu()
        x = self.two(x) + F.avg_pool2d(F.pad(x, (0, 0, 0, 0, 0, 5)).relu(), 2)
        x = F.pad(self.norm(self.three(x)), (0, 0, 0, 0, -1, 1)).relu() + x
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@case(lambda: torch.randn(2, 7, 6))
class Latents(nn.Module):
    """Queries that are learned, as in a Perceiver: one norm reads them, and later what was added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = nn.Parameter(torch.randn(5, 8)), nn.LayerNorm(8)
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(6, 16), nn.Linear(8, 8)
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.start.unsqueeze(0).expand(x.shape[0], -1, -1)
        q, (k, v) = self.q(self.norm(z)), self.kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        z = z + self.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        z = z + self.second(F.gelu(self.first(self.norm(z))))
        return self.head(z.mean(1))


@case(lambda: torch.randn(2, 3, 8, 8))
class AttentionByPlace(nn.Module):
    """The mean and the largest of all channels say where to look, as in CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)
        self.place, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.conv(x)
        by_channel = [self.second(self.first(pooled).relu()) for pooled in (y.mean((2, 3)), y.amax((2, 3)))]
        y = y * sum(by_channel).sigmoid()[..., None, None]
        seen = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return self.head((x + y * self.place(seen).sigmoid()).relu())


class Causal(nn.Conv2d):
    """A convolution that sees what is above and to the left: its weight is multiplied by a mask."""

    in_place = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        seen = torch.ones_like(self.weight)
        height, width = self.kernel_size
        seen[:, :, height // 2, width // 2 + 1 :] = 0
        seen[:, :, height // 2 + 1 :] = 0
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.weight.data *= self.seen
            return super().forward(x)
        return F.conv2d(x, self.weight * self.seen, self.bias, self.stride, self.padding)


class CausalInPlace(Causal):
    in_place = True


class PixelLayers(nn.Module):
    """Two streams with gated activations, as in PixelCNN."""

    def __init__(self, kind: type[Causal]) -> None:
        super().__init__()
        self.first = kind(1, 8, 5, padding=2)
        self.down = nn.ModuleList(kind(8, 16, 3, padding=1) for _ in range(2))
        self.right = nn.ModuleList(kind(8, 16, (1, 3), padding=(0, 1)) for _ in range(2))
        self.across = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(2))
        self.back, self.out = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = h = self.first(x)
        for down, right, across, back in zip(self.down, self.right, self.across, self.back, strict=True):
            v = down(v)
            a, b = (right(h) + across(v)).chunk(2, 1)
            h = h + back(a.tanh() * b.sigmoid())
            a, b = v.chunk(2, 1)
            v = a.tanh() * b.sigmoid()
        return self.out(h.relu())


@case(lambda: torch.randn(2, 1, 6, 6))
class PixelCnn(PixelLayers):
    def __init__(self) -> None:
        super().__init__(Causal)


@case(lambda: torch.randn(2, 1, 6, 6))
class PixelCnnInPlace(PixelLayers):
    def __init__(self) -> None:
        super().__init__(CausalInPlace)


@case(lambda: torch.randn(3, 6))
class Autoregressive(nn.Module):
    """A masked autoencoder: code multiplies the weights of linear layers by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 6)
        for name, shape in {"one": (12, 6), "two": (10, 12), "three": (6, 10)}.items():
            self.register_buffer(name, torch.ones(shape).tril(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first.weight * self.one, self.first.bias).relu()
        x = F.linear(x, self.two * self.second.weight, self.second.bias).relu()
        return F.linear(x, self.last.weight.mul(self.three), self.last.bias)


@case(lambda: (torch.randn(2, 5, 6), (torch.rand(2, 5) < 0.7).long()))
class MeanOfWords(nn.Module):
    """A mean over the words that a mask of integers names, spread as the states are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        states = self.first(x).relu()
        spread = mask.unsqueeze(-1).expand_as(states).float()
        return self.last((states * spread).sum(1) / spread.sum(1).clamp(min=1e-9))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_channels_go_with_all_that_belongs_to_them(kind: str, share: float) -> None:
    build, inputs = CASES[kind]
    torch.manual_seed(0)
    assert_compacts(redrawn(build()), inputs(), share)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["AttentionByPlace", "FilledUp", "Latents"])
def test_a_compact_network_is_pruned_again(kind: str) -> None:
    build, inputs = CASES[kind]
    torch.manual_seed(0)
    net, x = redrawn(build()), inputs()
    small = assert_compacts(net, x, 0.3)
    again = assert_compacts(small, x, 0.3)
    count = [sum(parameter.numel() for parameter in each.parameters()) for each in (net, small, again)]
    assert count[0] > count[1] > count[2]


SCALES = {
    "of itself": lambda weight, table: weight.pow(2).mean(1, keepdim=True).rsqrt(),
    "of its size": lambda weight, table: weight.abs().mean(),
    "of a softmax": lambda weight, table: torch.softmax(table, 1),
    "of a length": lambda weight, table: nn.functional.normalize(table, dim=1),
    "of a table": lambda weight, table: table,
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", sorted(SCALES))
def test_a_weight_times_what_depends_on_several_entries_keeps_its_columns(kind: str) -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(5, 3)
            self.weight = nn.Parameter(torch.randn(5, 8))
            self.register_buffer("table", torch.rand(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight * SCALES[kind](self.weight, self.table)
            out: Tensor = self.last(nn.functional.linear(self.first(x).relu(), weight))
            return out

    torch.manual_seed(0)
    model, x = Scales().eval(), torch.randn(4, 6)
    with torch.no_grad():
        model.first.weight[[1, 5]], model.first.bias[[1, 5]] = 0.0, 0.0
    for options in ({}, {"verify": False}, {"exact": False}):
        small = fxprune.compact(model, x, **options)
        assert torch.allclose(small(x), model(x), atol=1e-6)
    assert len(small.get_parameter("first.weight")) == (6 if kind == "of a table" else 8)
