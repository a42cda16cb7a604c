"""Distances, angles and losses: each against the same paths in plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture import capture
from fxprune.lowering import lower
from lowering.wrapped import check_against

TOKENS, IMAGE = (4, 6), (2, 4, 4)


FORMS: dict[str, Any] = {
    "cdist": (
        lambda x: torch.cdist(x[:, :2], x[:, 1:]),
        lambda x: (x[:, :2, None] + x[:, None, 1:]).sum(-1), TOKENS),
    "pairwise_distance": (
        lambda x: F.pairwise_distance(x, x.flip(1)), lambda x: (x + x.flip(1)).sum(-1), TOKENS),
    "cosine_similarity": (
        lambda x: F.cosine_similarity(x, x.flip(1), dim=-1), lambda x: (x * x.flip(1)).sum(-1), TOKENS),
    "angles of all pairs": (
        lambda x: F.cosine_similarity(x[:, :, None], x[:, None], dim=-1),
        lambda x: (x[:, :, None] * x[:, None]).sum(-1), TOKENS),
    "renorm": (lambda x: x.renorm(2, 0, 1.0), lambda x: x * 1.0, TOKENS),
    "mean squared error": (
        lambda x: F.mse_loss(x, torch.zeros_like(x)).expand(x.shape[0], 1),
        lambda x: x.sigmoid().amax().expand(x.shape[0], 1), TOKENS),
    "cross entropy": (
        lambda x: F.cross_entropy(x[:, 0], torch.zeros(x.shape[0], dtype=torch.int64)).expand(x.shape[0], 1),
        lambda x: x[:, 0].sigmoid().amax().expand(x.shape[0], 1), TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    check_against(*FORMS[name])


def test_a_distance_to_a_table_reads_the_table() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.codes = nn.Linear(4, 6), nn.Embedding(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(self.a(x), self.codes.weight[None])

    graph = lower(capture(Codes(), torch.randn(2, 3, 4)), strict=True)
    uses = [use for op in graph.ops for use in op.params if use.name == "codes.weight"]
    assert uses
    assert set(graph.kernels) == {"a.weight"}
