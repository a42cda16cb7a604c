"""Layers with weights: kernels, live taps, and paths against the oracle or plain operations."""

from __future__ import annotations

import torch
from oracle import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from lowering.agreement import assert_reach, lowered


class Pair(nn.Module):
    """A bilinear layer between linear ones, or the same as products and a linear layer."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 5, bias=False)
        self.mix, self.after, self.plain = nn.Bilinear(3, 5, 4), nn.Linear(4, 2, bias=False), plain

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if not self.plain:
            return self.after(self.mix(a, b))
        pairs = torch.einsum("ni,nj->nij", a, b).flatten(1)
        return self.after(F.linear(pairs, self.mix.weight.flatten(1), self.mix.bias))


def test_a_bilinear_layer() -> None:
    torch.manual_seed(0)
    model, example = Pair(False), torch.randn(2, 4)
    graph = lowered(model, example)
    assert graph.kernels["mix.weight"].shape == (4, 3, 5)
    for seed, density in enumerate((0.6, 0.3)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, Pair(True), example, masks, periodic=False)
