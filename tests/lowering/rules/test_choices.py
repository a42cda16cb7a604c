"""Choices by numbers: any entry may be chosen, so that the oracle runs a maximum over what may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.paths.count import reach
from lowering.agreement import assert_reach, lowered
from lowering.wrapped import Entries, masks_for

TOKENS = (5, 8)
Function = Callable[[Tensor], Tensor]


def _any(x: Tensor, dim: int, size: int) -> Tensor:
    return x.amax(dim, keepdim=True).expand(*[size if d == dim else -1 for d in range(x.dim())])


def _rows(x: Tensor) -> Tensor:
    """Places of two rows for each sample."""
    return x.sum(-1).topk(2, dim=1).indices


def _into_zeros(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 5, 8)
    y[torch.arange(x.shape[0])[:, None], _rows(x)] = x[:, :2]
    return y


FORMS: dict[str, tuple[Function, Function]] = {
    "topk": (lambda x: x.topk(3, dim=1).values, lambda x: _any(x, 1, 3)),
    "topk by place": (lambda x: torch.topk(x, 2)[0], lambda x: _any(x, 2, 2)),
    "sort": (lambda x: x.sort(1).values, lambda x: _any(x, 1, 5)),
    "largest row": (lambda x: x[torch.arange(x.shape[0]), x.sum(-1).argmax(1)], lambda x: x.amax(1)),
    "gather": (
        lambda x: x.gather(1, x[:, :2].argsort(-1).clamp(max=4)), lambda x: _any(x, 1, 2)),
    "take_along_dim": (
        lambda x: torch.take_along_dim(x, x.max(1, keepdim=True).indices, 1), lambda x: _any(x, 1, 1)),
    "rows of each sample": (
        lambda x: x[torch.arange(x.shape[0])[:, None], _rows(x)], lambda x: _any(x, 1, 2)),
    "index of one axis": (lambda x: x[:, :, x[0, 0].argsort()], lambda x: _any(x, 2, 8)),
    "index_select": (lambda x: x.index_select(1, x[0, :, 0].argsort()), lambda x: _any(x, 1, 5)),
    "scatter_add": (
        lambda x: torch.zeros(x.shape[0], 3, 8).scatter_add(1, x.argsort(1).clamp(max=2), x),
        lambda x: x.sum(1, keepdim=True).expand(-1, 3, -1)),
    "scatter over what was there": (
        lambda x: x[:, 1:].scatter(1, x[:, :2].argsort(1), x[:, 3:] * 2),
        lambda x: x[:, 1:] + x[:, 3:].sum(1, keepdim=True)),
    "index_add": (
        lambda x: torch.zeros(x.shape[0], 3, 8).index_add(1, x[0, :, 0].argsort().clamp(max=2), x),
        lambda x: x.sum(1, keepdim=True).expand(-1, 3, -1)),
    "scatter_reduce": (
        lambda x: torch.zeros(x.shape[0], 3, 8).scatter_reduce(1, x.argsort(1).clamp(max=2), x, "amax"),
        lambda x: x.sum(1, keepdim=True).expand(-1, 3, -1)),
    "written at rows": (_into_zeros, lambda x: x[:, :2].amax((0, 1))[None, None].expand(x.shape[0], 5, 8)),
    "masked_fill by numbers": (lambda x: x.masked_fill(x < 0, 0.0) * x.flip(1), lambda x: x * x.flip(1)),
    "masked_fill with a number": (
        lambda x: x.masked_fill(x < 0, 2.0) * x.flip(1), lambda x: (x + 2.0) * x.flip(1)),
    "one_hot is no path": (
        lambda x: F.one_hot(x.argmax(-1), 8).float() * x, lambda x: x * 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_any_entry_may_be_chosen(name: str) -> None:
    function, by_hand = FORMS[name]
    torch.manual_seed(0)
    model = Entries(function, TOKENS).eval()
    stated = Entries(by_hand, TOKENS).eval()
    example = model.example()
    graph = lowered(model, example)
    for seed, density in enumerate((0.5, 0.2)):
        masks = masks_for(model, seed, density)
        assert_reach(graph, stated, example, masks, periodic=False)


@pytest.mark.parametrize("name", FORMS)
def test_no_weight_with_a_gradient_is_missed(name: str) -> None:
    function, _ = FORMS[name]
    torch.manual_seed(0)
    model = Entries(function, TOKENS).eval()
    masks = masks_for(model, 1, 0.5)
    found = reach(lowered(model, model.example()), masks)
    with torch.no_grad():
        for key, mask in masks.items():
            model.get_parameter(key).mul_(mask)
    for _ in range(4):
        model.zero_grad()
        model(model.example()).sum().backward()
        for key, mask in masks.items():
            gradient = model.get_parameter(key).grad
            assert gradient is not None
            assert not bool((gradient.ne(0) & mask & ~found[key]).any()), key


class Experts(nn.Module):
    """A router, and rows in groups, each multiplied with its expert's matrix."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.router, self.fused = nn.Linear(8, 3, bias=False), fused
        self.up = nn.Parameter(torch.randn(3, 8, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            weight = self.router(x).softmax(-1).amax(-1, keepdim=True)
            rows = torch.einsum("nk,ekm->nem", x.amax(0, keepdim=True).expand(len(x), -1), self.up)
            return (rows.amax(1) * weight.amax(0, keepdim=True)).amax(0, keepdim=True).expand(len(x), -1)
        top, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0).int()
        y = torch._grouped_mm(x[order], self.up, offs=ends) * top[order][:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return y[back]


def test_experts_in_groups() -> None:
    torch.manual_seed(0)
    model, example = Experts(True), torch.randn(4, 8)
    graph = lowered(model, example)
    assert set(graph.kernels) == {"router.weight", "up"}
    for seed, density in enumerate((0.6, 0.1)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, Experts(False), example, masks, periodic=False)
