"""Constants of channels that went, in the biases of the layers that read them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from rewrite.compact.masked import assert_same, outputs


class Twice(nn.Module):
    """One layer reads channels of zeros twice, after different shifts."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift
        self.first, self.last = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.last(y + 1.0) + self.last(y + self.shift)
        return out


@pytest.mark.parametrize(("shift", "left"), [(1.0, 7), (2.0, 10)])
def test_a_bias_takes_what_all_calls_of_a_layer_read(shift: float, left: int) -> None:
    torch.manual_seed(0)
    net, x = Twice(shift).eval(), torch.randn(5, 4)
    with torch.no_grad():
        net.first.weight[:3], net.first.bias[:3] = 0.0, 0.0
    small = fxprune.compact(net, x, verify=False)
    assert_same(outputs(net, x), outputs(small, x))
    assert len(small.get_parameter("first.weight")) == left
