"""Tables that are added to the scores of attention lose the heads that attention loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import assert_same, outputs, redrawn


class Biased(nn.Module):
    """Attention with something added to its scores: a table, or entries of one that an index picks."""

    def __init__(self, fused: bool, kind: str) -> None:
        super().__init__()
        self.fused, self.kind = fused, kind
        self.first, self.qkv, self.out = nn.Linear(6, 8), nn.Linear(8, 36), nn.Linear(12, 4)
        self.table = nn.Parameter(torch.randn(10, 3) if kind == "picked" else torch.randn(3, 5, 5))
        self.mixed = nn.Linear(3, 3) if kind == "mixed" else None
        self.register_buffer("index", torch.randint(0, 10, (5, 5)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x).relu()).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        table = self.table[self.index].permute(2, 0, 1) if self.kind == "picked" else self.table
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=table)
        elif self.kind == "windows":
            scores = (q @ k.mT / 2 + table).view(1, -1, 3, 5, 5) + torch.ones(5, 5).tril()
            y = scores.view(-1, 3, 5, 5).softmax(-1) @ v
        else:
            scores = q @ k.mT / 2 + table
            if self.mixed is not None:
                scores = self.mixed(scores.transpose(1, 3)).transpose(1, 3)
            y = scores.softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("fused", "kind"),
    [(True, "whole"), (True, "picked"), (False, "whole"), (False, "picked"), (False, "windows")],
)
def test_what_is_added_to_scores_goes_with_its_head(fused: bool, kind: str) -> None:
    torch.manual_seed(0)
    model, x = redrawn(Biased(fused, kind)), torch.randn(2, 5, 6)
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0
        model.qkv.weight.view(3, 3, 4, 8)[:, 1] = 0
        model.qkv.bias.view(3, 3, 4)[:, 1] = 0
    small = fxprune.compact(model, x)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert small.get_submodule("qkv").out_features == 24
    assert small.get_parameter("table").numel() == model.table.numel() * 2 // 3
    assert_same(outputs(model, x), outputs(small, x))


def test_a_head_whose_scores_are_mixed_with_others_stays() -> None:
    torch.manual_seed(0)
    model, x = redrawn(Biased(False, "mixed")), torch.randn(2, 5, 6)
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0
        model.qkv.weight.view(3, 3, 4, 8)[:, 1] = 0
        model.qkv.bias.view(3, 3, 4)[:, 1] = 0
    small = fxprune.compact(model, x)
    assert_same(outputs(model, x), outputs(small, x))
    assert small.get_submodule("mixed").in_features == 3
    assert len(small.get_parameter("table")) == 3
