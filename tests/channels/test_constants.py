"""Sums over channels that are not zero when their weights are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Summed(nn.Module):
    def __init__(self, result: Callable[["Summed", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(5, 4)
        self.register_buffer("table", torch.randn(5, 12))
        self.learnt = nn.Parameter(torch.randn(5, 12))
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.result(self, self.second(self.first(x).relu())).expand(-1, 5))


NEVER_ZERO: dict[str, Callable[[Summed, Tensor], Tensor]] = {
    "sigmoid": lambda net, h: h.sigmoid().sum(1, keepdim=True),
    "shifted": lambda net, h: (h - 0.5).square().sum(1, keepdim=True),
    "mean": lambda net, h: h.exp().mean(1, keepdim=True),
    "cdist": lambda net, h: torch.cdist(h, net.table),
    "distance": lambda net, h: (h[:, None] - net.table).square().sum(-1),
}
ZERO: dict[str, Callable[[Summed, Tensor], Tensor]] = {
    "sum": lambda net, h: h.sum(1, keepdim=True),
    "relu": lambda net, h: h.relu().square().sum(1, keepdim=True),
    "learnt": lambda net, h: (h[:, None] - net.learnt).square().sum(-1),
    "made up for": lambda net, h: (h.exp() - 1).sum(1, keepdim=True),
    "scaled": lambda net, h: (h[:, None] * net.table).sum(-1),
}


@pytest.mark.parametrize("kind", NEVER_ZERO)
def test_channels_that_a_sum_would_miss_stay(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Summed(NEVER_ZERO[kind]), torch.randn(3, 8)
    groups = fxprune.channel_groups(model, example_inputs=x)
    free = {member.parameter for group in groups if not group.reason for member in group.members}
    assert "first.weight" in free
    reasons = {
        g.reason for g in groups if any(m.parameter == "second.weight" and m.axis == "out" for m in g.members)
    }
    assert len(reasons) == 1
    assert "over channels that are not zero without weights" in reasons.pop()
    assert_all_goes(model, x, 0.2)


@pytest.mark.parametrize("kind", ZERO)
def test_channels_that_add_nothing_go(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Summed(ZERO[kind]), torch.randn(3, 8)
    groups = fxprune.channel_groups(model, example_inputs=x)
    free = {m.parameter for g in groups if not g.reason for m in g.members if m.axis == "out"}
    assert "second.weight" in free
    assert_all_goes(model, x, 0.4)


def assert_all_goes(model: nn.Module, x: Tensor, sparsity: float) -> None:
    pruned = fxprune.apply(
        model, "magnitude", sparsity, granularity="channel", example_inputs=x, progress=False
    )
    small = fxprune.compact(pruned)
    assert not small.meta["fxprune"]["compaction"].given_back
    torch.testing.assert_close(small.eval()(x), fxprune.finalize(pruned).eval()(x))
