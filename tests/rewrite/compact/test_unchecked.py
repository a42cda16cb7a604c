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
    assert not torch.equal(again, Unchecked(small, 4).run(x)) or "dropout" in way
