"""Distances, samples of images, products along an axis: each against the same paths in plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision
from oracle import effective_parameters, random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach
from lowering.agreement import assert_reach, lowered
from lowering.wrapped import Entries, masks_for

TOKENS, IMAGE = (4, 6), (2, 4, 4)
Function = Callable[[Tensor], Tensor]


def _anywhere(x: Tensor) -> Tensor:
    return x.amax((2, 3), keepdim=True).expand_as(x)


def _grid(x: Tensor) -> Tensor:
    return x[:, :2].permute(0, 2, 3, 1)


def _boxes(x: Tensor) -> Tensor:
    return torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 0.0, 2.0, 3.0]])


def _triangle(x: Tensor) -> Tensor:
    """Running sums along the tokens."""
    return torch.stack([x[:, : i + 1].sum(1) for i in range(x.shape[1])], 1)


def _difference(x: Tensor) -> Tensor:
    return x[:, 1:] + x[:, :-1]


FORMS: dict[str, tuple[Function, Function, Sequence[int]]] = {
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
    "cumprod": (lambda x: x.cumprod(1), lambda x: _triangle(x.sigmoid()), TOKENS),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), lambda x: _triangle(x.sigmoid()), TOKENS),
    "logsumexp": (lambda x: x.logsumexp(-1), lambda x: x.sigmoid().sum(-1), TOKENS),
    "prod": (lambda x: x.prod(1), lambda x: x.amax(1), TOKENS),
    "quantile": (lambda x: x.quantile(0.5, dim=-1, keepdim=True), lambda x: x.amax(-1, keepdim=True), TOKENS),
    "diff": (lambda x: x.diff(dim=1), _difference, TOKENS),
    "diff twice": (lambda x: x.diff(n=2, dim=1), lambda x: _difference(_difference(x)), TOKENS),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), lambda x: F.avg_pool2d(x, 2), IMAGE),
    "meshgrid": (
        lambda x: torch.stack(torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")).expand(len(x), -1, -1, -1),
        lambda x: torch.stack([x[0, 0][:, None].expand(-1, 6), x[0, 1][None].expand(6, -1)])
        .expand(len(x), -1, -1, -1), TOKENS),
    "fftshift": (lambda x: torch.fft.fftshift(x, dim=1), lambda x: x.roll(2, 1), TOKENS),
    "block_diag": (
        lambda x: torch.block_diag(x[0, :1], x[0, 1:])[None].expand(len(x), -1, -1),
        lambda x: torch.cat([F.pad(x[0, :1], (0, 6)), F.pad(x[0, 1:], (6, 0))]).expand(len(x), -1, -1),
        TOKENS),
    "kron": (
        lambda x: torch.stack([torch.kron(y[:2, :3], y[2:, :2]) for y in x.unbind(0)]),
        lambda x: (x[:, :2, None, :3, None] * x[:, 2:, :2][:, None, :, None]).reshape(-1, 4, 6), TOKENS),
    "multi_dot": (
        lambda x: torch.stack([torch.linalg.multi_dot([y, y.t(), y]) for y in x.unbind(0)]),
        lambda x: x @ x.transpose(1, 2) @ x, TOKENS),
    "polar": (
        lambda x: torch.view_as_real(torch.polar(x, x.flip(1))).sum(-1),
        lambda x: x * x.flip(1).sigmoid() + x * x.flip(1).sigmoid(), TOKENS),
    "complex": (
        lambda x: torch.view_as_real(torch.complex(x, x.flip(1))).sum(-1),
        lambda x: x + x.flip(1) + x + x.flip(1), TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    function, by_hand, shape = FORMS[name]
    torch.manual_seed(0)
    model, stated = Entries(function, shape).eval(), Entries(by_hand, shape).eval()
    example = model.example()
    graph = lowered(model, example)
    for seed, density in enumerate((0.5, 0.2)):
        masks = masks_for(model, seed, density)
        assert_reach(graph, stated, example, masks, periodic=False)


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        return x / by

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] / 2, None


class Shares(Halve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        return x.abs() / x.abs().amax(-1, keepdim=True)


def test_a_users_own_function_is_elementwise_if_it_computes_so() -> None:
    class Own(nn.Module):
        def __init__(self, function: type[torch.autograd.Function]) -> None:
            super().__init__()
            self.a, self.b, self.function = nn.Linear(4, 6, bias=False), nn.Linear(6, 2), function

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.function.apply(self.a(x), 2.0))

    torch.manual_seed(0)
    model, example = Own(Halve), torch.randn(2, 4)
    graph = lowered(model, example)
    plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2))
    masks = random_masks(plain, 0.4, 0)
    named = {{"0.weight": "a.weight", "1.weight": "b.weight"}[name]: mask for name, mask in masks.items()}
    wanted = effective_parameters(plain, example, masks)
    found = reach(graph, named)
    assert torch.equal(found["a.weight"], wanted["0.weight"])
    assert torch.equal(found["b.weight"], wanted["1.weight"])
    (op,) = lower(capture(Own(Shares), example)).opaque
    assert op.reason == "Shares.apply is not elementwise"


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
