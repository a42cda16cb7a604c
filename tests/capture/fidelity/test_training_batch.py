"""A branch of training that fixes the batch size holds for that size, and the graph says so."""

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import capture


class Noisy(nn.Module):
    """Adds noise in training, for as many samples as a Python number says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            noise = torch.tensor([[0.1]] * len(x))
            x = x + noise * torch.rand(len(noise), 1)
        out: Tensor = self.layer(x)
        return out


def test_a_batch_size_that_training_fixes_is_checked() -> None:
    with pytest.warns(UserWarning, match="batch size"):
        gm = capture(Noisy(), torch.randn(2, 4))
    assert gm.train()(torch.randn(2, 4)).shape == (2, 3)
    with pytest.raises(AssertionError, match="size 2"):
        gm(torch.randn(3, 4))
