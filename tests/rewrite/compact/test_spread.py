"""Entries that code spreads over channels by hand, whatever it calls for that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune

Ways = dict[str, Callable[[Tensor, Tensor], Tensor]]

SPREAD: Ways = {
    "expand_as": lambda h, g: (g.expand_as(h) * 2).sqrt(),
    "expand to a size": lambda h, g: g.expand(h.size()),
    "expand to numbers": lambda h, g: g.expand(-1, -1, 12).sigmoid(),
    "repeat": lambda h, g: g.repeat(1, 1, 12),
    "repeat a tuple": lambda h, g: g.repeat((1, 1, 12)),
    "tile": lambda h, g: torch.tile(g, (1, 12)),
    "repeat_interleave": lambda h, g: g.repeat_interleave(12, -1),
    "by words": lambda h, g: torch.repeat_interleave(g, repeats=12, dim=2),
    "a condition": lambda h, g: (g > 3).expand_as(h).to(h.dtype),
}


class Spreads(nn.Module):
    """Multiplies channels by a number of each row, of integers (a mask, ``live=False``) or of its input."""

    def __init__(self, spread: Callable[[Tensor, Tensor], Tensor], live: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.spread, self.live = spread, live

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x).relu()
        row = x.abs().sum(-1, keepdim=True) if self.live else mask.unsqueeze(-1)
        result: Tensor = self.last(h * self.spread(h, row))
        return result


def halved(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, nn.Module]:
    """The model with half of its channels masked, and compacted without a look at its outputs."""
    pruned = fxprune.apply(
        model, "magnitude", 0.5, granularity="channel", example_inputs=inputs, progress=False
    ).eval()
    return pruned, fxprune.compact(pruned, verify=False)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("way", sorted(SPREAD))
def test_what_is_spread_over_channels_goes_with_them(way: str, live: bool) -> None:
    torch.manual_seed(0)
    model = Spreads(SPREAD[way], live).eval()
    pruned, small = halved(model, (torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.int64)))
    assert small.get_parameter("first.weight").shape == (6, 6)
    for batch in (2, 3):
        x, mask = torch.randn(batch, 5, 6), torch.randint(0, 2, (batch, 5))
        assert torch.allclose(small(x, mask), pruned(x, mask), atol=1e-6)


READ: Ways = {
    "a sum": lambda h, g: h / g.expand_as(h).sum(-1, keepdim=True),
    "a place": lambda h, g: torch.where((g > 3).expand_as(h), h, torch.zeros_like(h)),
    "a filled place": lambda h, g: h.masked_fill((g > 3).expand_as(h), 0.0),
}


@pytest.mark.parametrize("way", sorted(READ))
def test_readers_of_what_is_spread_see_what_they_saw(way: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(READ[way](self.first(x).relu(), x.abs().sum(-1, keepdim=True)))
            return result

    torch.manual_seed(0)
    pruned, small = halved(Reads().eval(), (torch.randn(2, 5, 6),))
    assert small.get_parameter("first.weight").shape == (6, 6)
    x = torch.randn(3, 5, 6)
    assert torch.allclose(small(x), pruned(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["returned", "softmax"])
def test_channels_stay_where_what_is_spread_is_read_by_more(kind: str) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            wide = x.abs().sum(-1, keepdim=True).expand(-1, -1, 12)
            if kind == "softmax":
                return self.last(h * wide.softmax(-1)), x
            return self.last(h * wide), wide

    groups = fxprune.channel_groups(Keeps().eval(), torch.randn(2, 5, 6))
    assert all(group.reason for group in groups)


def test_an_axis_that_is_shaped_like_another_keeps_its_size_where_it_is_an_output() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.first(x).relu()
            return self.last(h), x.mean(-1, keepdim=True).expand_as(h), x.repeat(1, 1, 2).view_as(h)

    torch.manual_seed(0)
    pruned, small = halved(Both().eval(), (torch.randn(2, 5, 6),))
    assert small.get_parameter("first.weight").shape == (6, 6)
    x = torch.randn(3, 5, 6)
    for found, wanted in zip(small(x), pruned(x), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
