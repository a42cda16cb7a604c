"""Samples of images: each against the same paths in plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from oracle import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from lowering.agreement import assert_reach, lowered
from lowering.wrapped import check_against

TOKENS, IMAGE = (4, 6), (2, 4, 4)


def _anywhere(x: Tensor) -> Tensor:
    return x.amax((2, 3), keepdim=True).expand_as(x)


def _grid(x: Tensor) -> Tensor:
    return x[:, :2].permute(0, 2, 3, 1)


def _boxes(x: Tensor) -> Tensor:
    return torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 0.0, 2.0, 3.0]])


FORMS: dict[str, Any] = {
    "grid_sample": (
        lambda x: F.grid_sample(x, _grid(x).tanh(), align_corners=False),
        lambda x: _anywhere(x) * _grid(x).sum(-1).sigmoid()[:, None], IMAGE),
    "a grid that is known": (
        lambda x: F.grid_sample(x, torch.zeros(x.shape[0], 3, 2, 2), align_corners=False),
        lambda x: x.amax((2, 3), keepdim=True).expand(-1, -1, 3, 2), IMAGE),
    "affine_grid": (
        lambda x: F.affine_grid(x[:, :, :1, :3].reshape(-1, 2, 3), [len(x), 1, 2, 2], align_corners=False),
        lambda x: x[:, :, :1, :3].reshape(-1, 2, 3).sum(-1)[:, None, None].expand(-1, 2, 2, -1), IMAGE),
    "roi_align": (
        lambda x: torchvision.ops.roi_align(x, _boxes(x), (2, 2)),
        lambda x: x.amax((0, 2, 3), keepdim=True).expand(2, -1, 2, 2), IMAGE),
    "max_unpool": (
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), _anywhere, IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    check_against(*FORMS[name])


class Deformed(nn.Module):
    """A deformable convolution, or a convolution that reads any position with each tap."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.stem, self.shift = nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(2, 12, 1, bias=False)
        self.gate, self.head = nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)
        self.conv, self.plain = torchvision.ops.DeformConv2d(4, 4, (2, 3), groups=2, bias=False), plain

    def forward(self, x: Tensor) -> Tensor:
        y, shift, gate = self.stem(x), self.shift(x)[:, :, 1:, 1:-1], self.gate(x)[:, :, 1:, 1:-1]
        if not self.plain:
            return self.head(self.conv(y, shift, gate))
        n, _, h, w = shift.shape
        moved = shift.reshape(n, 6, 2, h, w).sum(2).sigmoid() * gate
        taps = y.amax((2, 3))[:, :, None, None, None] * moved[:, None]  # n, c, tap, h, w
        groups = [
            torch.einsum("nckhw,ock->nohw", part, weight.flatten(2))
            for part, weight in zip(taps.chunk(2, 1), self.conv.weight.chunk(2), strict=True)
        ]
        return self.head(torch.cat(groups, 1))


def test_a_deformable_convolution() -> None:
    torch.manual_seed(0)
    model, example = Deformed(False), torch.randn(2, 2, 4, 4)
    graph = lowered(model, example)
    assert "conv.weight" in graph.kernels
    for seed, density in enumerate((0.7, 0.3)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, Deformed(True), example, masks, periodic=False)
