"""Networks that draw random numbers in evaluation get smaller, and are the same but for what they draw."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.rewrite.compact.unchecked import Unchecked


class Draws(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.way(self.second(self.way(self.first(x).relu())).relu()))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5, True),
    "dropout by name": lambda h: F.dropout(h, p=0.3, training=True),
    "noise": lambda h: h * (1 + 0.1 * torch.randn_like(h)),
    "coins": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "drawn into": lambda h: h * h.new_empty(h.shape).uniform_(0.5, 1.5),
    "one draw": lambda h: h * torch.rand(1),
}


@pytest.mark.parametrize("way", WAYS)
def test_channels_of_networks_that_draw_go(way: str) -> None:
    torch.manual_seed(0)
    model, x = Draws(WAYS[way]).eval(), torch.randn(4, 8)
    pruned = fxprune.apply(model, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    state = torch.random.get_rng_state()
    small = fxprune.compact(pruned)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not small.meta["fxprune"]["compaction"].given_back
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert after < 0.7 * before
    again = Unchecked(small, 3).run(x)
    torch.testing.assert_close(again, Unchecked(fxprune.capture(fxprune.finalize(pruned), x), 3).run(x))
    assert not torch.equal(again, Unchecked(small, 4).run(x))


RANDOM_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    **WAYS,
    "coins of each row": lambda h: h * h.new_empty(len(h), 1).bernoulli_(0.9),
    "a threshold": lambda h: h * (torch.rand_like(h) > 0.1),
    "kept paths": lambda h: h * (torch.rand(len(h), 1) + 0.9).floor(),
    "an integer": lambda h: h * torch.randint(0, 2, (1,)),
    "steep": lambda h: F.rrelu(-h, 0.1, 0.9, True),
}


@pytest.mark.every_case
@pytest.mark.parametrize("way", RANDOM_FACTORS)
def test_what_a_draw_makes_of_a_constant_is_none(way: str) -> None:
    """A channel without weights has a bias, which a draw may drop: no bias of another layer can take it."""
    torch.manual_seed(0)
    model, x = Draws(RANDOM_FACTORS[way]).eval(), torch.randn(4, 8)
    with torch.no_grad():
        model.first.weight[:8], model.first.bias[:4], model.first.bias[4:8] = 0.0, 1.0, 0.0
    small = fxprune.compact(model, x)
    assert small.get_parameter("first.weight").shape[0] == 20, "those with a bias stay"
