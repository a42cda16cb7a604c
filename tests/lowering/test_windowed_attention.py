"""Attention over tensors of any rank: windows and heads as batch axes of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import effective_parameters, random_masks
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach


class Attend(nn.Module):
    """Queries, keys and values of ``extra`` more batch axes than usual."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.head = nn.Linear(8, 3, bias=False)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shape = (x.shape[0], *[1] * self.extra, *x.shape[1:])
        mixed = F.scaled_dot_product_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape))
        return self.head(mixed.reshape(x.shape))


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 4])
def test_letters_of_batch_axes_and_of_channels_differ(extra: int) -> None:
    torch.manual_seed(extra)
    model, x = Attend(extra).eval(), torch.randn(2, 5, 8)
    graph = lower(capture(model, x))
    assert not graph.opaque
    for density in (0.6, 0.2):
        masks = random_masks(model, density, extra)
        found, wanted = reach(graph, masks), effective_parameters(model, x, masks)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
