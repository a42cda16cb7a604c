"""Finalized modules: plain ones, with the numbers of the masked ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.rewrite import finalize, set_masks, verify


class Centred(nn.Linear):
    """A linear layer whose weight has rows of mean zero."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Doubled(nn.Linear):
    """The same, and what no linear layer does."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def half(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns) < 0.5


def test_a_layer_becomes_the_stock_one_where_that_computes_the_same() -> None:
    x = torch.randn(2, 6)
    for kind, stock in ((Centred, True), (Doubled, False)):
        model = nn.Sequential(kind(6, 4))
        set_masks(model, {"0.weight": half(4, 6)})
        final = finalize(model)
        torch.testing.assert_close(final(x), model(x))
        assert (type(final[0]) is nn.Linear) == stock


class Penalised(nn.Module):
    """A parameter that makes a kernel and is added as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True)) + self.weight.square().sum()


def test_a_parameter_that_is_read_elsewhere_stays_beside_its_kernel() -> None:
    model, x = Penalised(), torch.randn(2, 6)
    gm = capture(model, x)
    mask = half(4, 6)
    set_masks(gm, {"weight": mask})
    verify(gm)
    final = finalize(gm)
    torch.testing.assert_close(final(x), gm(x))
    assert set(dict(final.named_parameters())) == {"weight", "weight_kernel"}
    assert not bool(final.get_parameter("weight_kernel")[~mask].any())
