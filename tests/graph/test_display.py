"""The text of a graph says of each op what tells it apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.linalg.lu_factor(self.first(x))[0])
        return y


def test_an_opaque_op_shows_its_reason() -> None:
    graph = lower(capture(Factors(), torch.ones(2, 3)))
    assert graph.opaque
    for op in graph.opaque:
        assert op.reason in str(graph)


class Added(nn.Module):
    """A value that is repeated, and one that a number is added to."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + torch.zeros(4, 2, 3), x + 1


def test_what_adds_a_number_is_never_zero() -> None:
    lines = lower(capture(Added(), torch.ones(2, 3))).summary().splitlines()
    assert [line for line in lines if "Affine" in line] == [
        "%1 = Affine(%0) 4x2x3",
        "%2 = Affine(%0) 2x3 never Zero",
    ]
