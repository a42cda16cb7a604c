"""Weights of transposed convolutions, read as those of plain ones."""

import pytest
import torch
from torch import nn

from fxprune.channels.orientation import swap_orientation


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_turning_is_its_own_inverse_and_says_what_pytorch_does(groups: int) -> None:
    weight = torch.rand(4, 3, 3, 3)
    assert torch.equal(swap_orientation(swap_orientation(weight, groups), groups), weight)
    x = torch.rand(2, 4, 5, 5)
    out = nn.functional.conv_transpose2d(x, weight, groups=groups)
    plain = nn.functional.conv2d(
        nn.functional.pad(x, (2, 2, 2, 2)), swap_orientation(weight, groups).flip(2, 3), groups=groups
    )
    assert torch.allclose(out, plain, atol=1e-5)
