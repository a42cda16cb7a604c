"""Masks and lengths among the inputs: what is computed of them is known, and features still go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower


class Pooled(nn.Module):
    """The mean of the features where a mask holds, or up to a length."""

    def __init__(self, *, by_length: bool) -> None:
        super().__init__()
        self.first, self.last, self.by_length = nn.Linear(4, 6), nn.Linear(6, 3), by_length

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        kept = torch.arange(x.shape[1]) < where[:, None] if self.by_length else ~where
        count = kept.sum(1, keepdim=True)
        if (count == 0).any():
            raise ValueError("nothing is kept")
        result: Tensor = self.last(h.masked_fill(~kept[..., None], 0).sum(1) / count)
        return result


class Basis(nn.Module):
    """Features times a table of their own, seen as a row once they are contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[:, :, None]
        h = (h >= torch.linspace(-1, 1, 4)[:-1]) * h
        result: Tensor = self.last(h.contiguous().view(x.size(0), -1))
        return result


@pytest.mark.parametrize("by_length", [False, True])
def test_masks_and_lengths_are_no_obstacle(by_length: bool) -> None:
    torch.manual_seed(0)
    model = Pooled(by_length=by_length)
    where = torch.tensor([5, 2]) if by_length else torch.arange(5) > torch.tensor([[4], [1]])
    given = torch.randn(2, 5, 4), where
    gm = capture(model, given)
    assert torch.equal(gm(*given), model(*given))
    assert not lower(gm, strict=True).opaque
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=given, progress=False
    )
    small = fxprune.compact(pruned.eval())
    torch.testing.assert_close(small(*given), pruned(*given))
    assert small.get_parameter("first.weight").shape[0] < 6


def test_what_is_seen_as_a_row_gets_shorter() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    pruned = fxprune.apply(
        Basis(), "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False
    ).eval()
    small = fxprune.compact(pruned)
    torch.testing.assert_close(small(x), pruned(x))
