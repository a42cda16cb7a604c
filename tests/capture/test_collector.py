"""The garbage collector while a graph is made, and afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import CaptureError, capture, capture_own


class Asks(nn.Module):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(2, 2), fails

    def forward(self, x: Tensor) -> Tensor:
        print(gc.isenabled())  # what a trace writes elsewhere is undone
        if self.fails and x.sum() > 0:
            x = x + 1
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_it_rests_and_is_left_as_it_was(
    fails: bool, enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not enabled:
        gc.disable()
    try:
        if fails:
            with pytest.raises(CaptureError):
                capture_own(Asks(True), torch.ones(1, 2))
        else:
            capture(Asks(False), torch.ones(1, 2))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert set(capsys.readouterr().out.split()) == {"False"}
