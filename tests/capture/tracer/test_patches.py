"""Calls that PyTorch does not report to a mode are part of the graph all the same."""

from __future__ import annotations

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
