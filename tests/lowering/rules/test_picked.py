"""Matrices of which the input picks some: the oracle runs a maximum over the products with each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from oracle import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.lowering import hidden_layers
from lowering.agreement import assert_flow, assert_reach, lowered

Forward = Callable[["Experts", Tensor], Tensor]


class Experts(nn.Module):
    """A layer, a router, two stacks of matrices, and a head; ``way`` brings rows and matrices together."""

    def __init__(self, way: Forward) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.router = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.head = nn.Linear(8, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(x + self.way(self, x))


def _routed(m: Experts, x: Tensor, number: int = 1) -> tuple[Tensor, Tensor]:
    return m.router(x).softmax(-1).topk(number, -1)


def _any_expert(m: Experts, x: Tensor, number: int = 1) -> Tensor:
    """Each product with any of the matrices, as many as are picked."""
    top = m.router(x).softmax(-1).amax(-1, keepdim=True)
    h = torch.einsum("bi,eoi->beo", x, m.up).amax(1).relu()
    return torch.einsum("bo,eio->bei", h, m.down).amax(1) * top * number


def _bmm(m: Experts, x: Tensor) -> Tensor:
    top, chosen = _routed(m, x)
    h = torch.bmm(m.up[chosen[:, 0]], x.unsqueeze(-1)).relu()
    return torch.bmm(m.down[chosen[:, 0]], h).squeeze(-1) * top


def _einsum(m: Experts, x: Tensor) -> Tensor:
    top, chosen = _routed(m, x, 2)
    h = torch.einsum("bi,bkoi->bko", x, m.up[chosen]).relu()
    return torch.einsum("bko,bkio,bk->bi", h, m.down[chosen], top)


def _moved(m: Experts, x: Tensor) -> Tensor:
    top, chosen = _routed(m, x)
    gate, value = m.up.index_select(0, chosen.flatten()).transpose(1, 2).flip(2).chunk(2, 2)
    h = torch.cat([x.unsqueeze(1) @ gate, x.unsqueeze(1) @ value], -1)
    return (h @ m.down[chosen.flatten()].mT).squeeze(1) * top


def _any_half(m: Experts, x: Tensor) -> Tensor:
    top = m.router(x).softmax(-1).amax(-1, keepdim=True)
    h = torch.einsum("bi,eoi->beo", x, m.up.flip(1)).amax(1)
    return torch.einsum("bo,eio->bei", h, m.down).amax(1) * top


def _for_all(m: Experts, x: Tensor) -> Tensor:
    best = m.router(x).mean(0).argmax()
    return (x @ m.up[best].T).relu() @ m.down[best].T


def _any_without_router(m: Experts, x: Tensor) -> Tensor:
    h = torch.einsum("bi,eoi->beo", x, m.up).amax(1).relu()
    return torch.einsum("bo,eio->bei", h, m.down).amax(1)


def _those_hit(m: Experts, x: Tensor) -> Tensor:
    top, chosen = _routed(m, x, 2)
    mask, y = F.one_hot(chosen, 4).permute(2, 1, 0), torch.zeros_like(x)
    for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
        expert = expert[0]
        if expert == 3:
            continue
        place, row = torch.where(mask[expert])
        h = F.linear(F.linear(x[row], m.up[expert]).relu(), m.down[expert])
        y.index_add_(0, row, h * top[row, place, None])
    return y


def _any_to_any(m: Experts, x: Tensor) -> Tensor:
    """As above, where any row is met, and any gets the result."""
    top = m.router(x).softmax(-1).amax()
    h = torch.einsum("bi,eoi->beo", x.amax(0, keepdim=True), m.up).amax(1).relu()
    return (torch.einsum("bo,eio->bei", h, m.down).amax(1) * top).expand(len(x), -1)


FORMS: dict[str, tuple[Forward, Forward]] = {
    "bmm": (_bmm, _any_expert),
    "einsum over picks": (_einsum, _any_expert),
    "moved and cut": (_moved, _any_half),
    "one for the batch": (_for_all, _any_without_router),
    "a loop over those that were hit": (_those_hit, _any_to_any),
}


@pytest.mark.parametrize("name", FORMS)
def test_any_matrix_may_be_picked(name: str) -> None:
    torch.manual_seed(0)
    way, by_hand = FORMS[name]
    model, example = nn.Sequential(Experts(way)).eval(), torch.randn(5, 6)
    stated = nn.Sequential(Experts(by_hand)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*kept whole")
        graph = lowered(model, example)
    assert {"0.up", "0.down"} <= graph.kernels.keys()
    for seed, density in enumerate((0.6, 0.15)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, stated, example, masks, periodic=False)
    if name == "bmm":
        assert_flow(graph, stated, example, masks)


@pytest.mark.parametrize("method", ["magnitude", "snip", pytest.param("synflow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["einsum over picks", "a loop over those that were hit"])
@pytest.mark.filterwarnings("ignore:.*kept whole")
def test_masks_of_picked_matrices_hold(name: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(FORMS[name][0])), torch.randn(5, 6)
    asked = {"data": [(x, torch.randn(5, 4))], "loss_fn": F.mse_loss} if method == "snip" else {}
    pruned = fxprune.apply(model, method, 0.5, example_inputs=x, progress=False, **asked)
    masks = fxprune.masks(pruned)
    assert {"0.up", "0.down", "0.router.weight"} <= masks.keys()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for key, mask in masks.items():
            zeroed.get_parameter(key).mul_(mask)
            pruned.get_parameter(key).data += 3.0 * ~mask
    torch.testing.assert_close(pruned(x), zeroed(x))
    pruned(x).square().sum().backward()
    for key, mask in masks.items():
        gradient = pruned.get_parameter(key).grad
        assert gradient is not None
        assert not bool(gradient[~mask].any())


@pytest.mark.parametrize("name", ["bmm", "einsum over picks", "moved and cut", "one for the batch"])
def test_picked_matrices_lose_channels(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    pruned = fxprune.apply(
        Experts(FORMS[name][0]), "magnitude", 0.3, example_inputs=x, granularity="channel", progress=False
    )
    small = fxprune.compact(pruned, progress=False).eval()
    assert small.get_parameter("up").shape[1] < 12
    more = torch.randn(7, 6)
    torch.testing.assert_close(small(more), pruned.eval()(more))


class Ensemble(nn.Module):
    """Layers of an ensemble, of which the input picks one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.abs().argmax(-1) % 3
        weights = torch.stack([layer.weight for layer in self.layers])
        return torch.bmm(weights[chosen], x.unsqueeze(-1)).squeeze(-1)


def test_picked_of_joined_layers() -> None:
    torch.manual_seed(0)
    model, x = Ensemble(), torch.randn(5, 6)
    assert set(lowered(model, x).kernels) == {f"layers.{i}.weight" for i in range(3)}
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, returns="module", progress=False)
    fxprune.verify(pruned)  # how dense what is picked is, depends on what is picked


class Either(nn.Module):
    """Goes one of two ways, or does more in one case than in the other, as the numbers say."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.more = more
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.more:
            y = self.one(x)
            if x.mean() > 0:
                y = y + self.other(x).relu()
            return y
        y = self.one(x) if x.mean() > 0 else self.other(x)
        return y


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.filterwarnings("ignore:.*kept whole")
def test_no_weight_of_a_branch_is_lost(more: bool) -> None:
    torch.manual_seed(0)
    gm = fxprune.capture(nn.Sequential(nn.Linear(6, 6), Either(more), nn.Linear(6, 2)), torch.randn(3, 6))
    graph = fxprune.lower(gm)
    inside = {"1.one.weight", "1.other.weight"}
    assert inside <= (graph.kernels.keys() if more else hidden_layers(gm, graph).keys())


class Emptied(nn.Module):
    """Sets all to zero where the numbers say so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return torch.zeros_like(y) if y.mean() > 9 else y


@pytest.mark.filterwarnings("ignore:.*kept whole")
def test_a_branch_of_zeros_is_not_taken_for_all_there_is() -> None:
    torch.manual_seed(0)
    gm = fxprune.capture(nn.Sequential(nn.Linear(6, 6), Emptied(), nn.Linear(6, 2)), torch.randn(3, 6))
    graph = fxprune.lower(gm)
    assert "1.layer.weight" in hidden_layers(gm, graph)
    assert len(graph.opaque) == 1


class Escalates(nn.Module):
    """Takes the place of one layer's result by another's where the first is large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.big = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.small(x)
        if y.max() > 0.5:
            y = self.big(x)
        return y


@pytest.mark.filterwarnings("ignore:capture. 1 .Escalates. kept whole", "ignore:.*cannot be pruned")
def test_a_branch_in_which_a_layer_is_for_nothing_is_not_taken_for_all_there_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), Escalates(), nn.Linear(6, 3))
    pruned = fxprune.apply(model, "synflow", 0.5, example_inputs=x, progress=False)
    assert fxprune.masks(pruned).keys() == {"0.weight", "2.weight"}
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    assert all(bool(mask.any()) for mask in fxprune.masks(pruned).values())
    assert fxprune.masks(pruned).keys() >= {"1.small.weight", "1.big.weight"}
