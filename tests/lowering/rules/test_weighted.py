"""Layers that have no rule of their own say so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower


def test_a_bilinear_layer_is_opaque_by_name() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both = nn.Linear(3, 4), nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = self.both(y, y)
            return z

    (op,) = lower(capture(Pair(), torch.ones(2, 3))).opaque
    assert "bilinear layer" in op.reason
