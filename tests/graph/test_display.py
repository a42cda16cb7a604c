"""The text of a graph says of each op what tells it apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).renorm(2, 0, 1.0))
        return y


def test_an_opaque_op_shows_its_reason() -> None:
    graph = lower(capture(Sorted(), torch.ones(2, 3)))
    assert graph.opaque
    for op in graph.opaque:
        assert op.reason in str(graph)
