"""Cut what code views, splits and overwrites in parameters: tables of positions, packed biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from rewrite.compact.masked import assert_compacts, redrawn

X = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
HEADS, N = 4, 9
INDEX = torch.randint(0, 25, (N, N), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Attention with a table of positions by head, and a bias that ``cut`` makes of the projection's."""

    def __init__(self, look_up: Callable[[Tensor], Tensor], cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.qkv, self.out = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(25, HEADS))
        self.look_up, self.cut = look_up, cut

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(self.first(x), self.qkv.weight, self.cut(self.qkv.bias))
        q, k, v = packed.reshape(x.shape[0], N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) + self.look_up(self.table)
        y: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def as_it_is(bias: Tensor) -> Tensor:
    return bias


def looked_up(table: Tensor) -> Tensor:
    return table[INDEX].permute(2, 0, 1)


def viewed(table: Tensor) -> Tensor:
    return table[INDEX.view(-1)].view(N, N, HEADS).permute(2, 0, 1).contiguous().unsqueeze(0)


def turned(table: Tensor) -> Tensor:
    return table.t()[:, INDEX.view(-1)].reshape(HEADS, N, N)


def with_zeros(table: Tensor) -> Tensor:
    table = table.clone()
    table[0] = 0
    return table.index_select(0, INDEX.view(-1)).view(N, N, HEADS).permute(2, 0, 1)


def scaled(table: Tensor) -> Tensor:
    return 16 * torch.sigmoid(table.mul(2)[INDEX.view(-1)].view((N, N, HEADS))).permute(2, 0, 1)


def zeroed(bias: Tensor) -> Tensor:
    bias = bias.clone()
    bias[16:32].zero_()
    return bias


def overwritten(bias: Tensor) -> Tensor:
    bias = bias.clone()
    bias[16:32] = 0
    return bias


def joined(bias: Tensor) -> Tensor:
    return torch.cat([bias[:16], torch.zeros_like(bias[:16]), bias[32:]])


def in_parts(bias: Tensor) -> Tensor:
    first, second, third = bias.split(16)
    return torch.cat([first * 2, second, third])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("look_up", [looked_up, viewed, turned, with_zeros, scaled])
def test_tables_lose_heads(look_up: Callable[[Tensor], Tensor]) -> None:
    net = redrawn(Attention(look_up, as_it_is))
    pruned = fxprune.apply(net, "random", 0.4, example_inputs=X, granularity="head", progress=False, seed=1)
    small = fxprune.compact(pruned, X)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    left = small.get_parameter("table").shape[1]
    assert left < HEADS
    assert small.get_submodule("qkv").weight.shape[0] <= 12 * left
    with torch.no_grad():
        for x in (X, torch.cat([X, -X])):
            torch.testing.assert_close(pruned.eval()(x), small.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("cut", [zeroed, overwritten, in_parts])
def test_packed_biases_lose_channels(cut: Callable[[Tensor], Tensor]) -> None:
    small = assert_compacts(redrawn(Attention(viewed, cut)), X, 0.5)
    assert small.get_submodule("qkv").bias.shape == small.get_submodule("qkv").weight.shape[:1] < (48,)


@pytest.mark.slow
def test_a_part_that_is_not_read_stays() -> None:
    small = assert_compacts(redrawn(Attention(viewed, joined)), X, 0.5)
    rows = len(small.get_submodule("qkv").weight)
    assert small.get_submodule("qkv").bias.shape == (16 + rows * 2 // 3,)


def test_numbers_that_are_none_are_not_taken_for_entries_that_go() -> None:
    def halved(broken: bool) -> dict[str, torch.Size]:
        net = redrawn(Attention(viewed, in_parts))
        pruned = fxprune.apply(
            net, "random", 0.5, example_inputs=X, granularity="channel", progress=False, seed=1
        )
        if broken:
            with torch.no_grad():
                kept = fxprune.masks(pruned)["qkv.weight"].any(1).nonzero().flatten()
                pruned.get_parameter("qkv.bias")[kept[0]] = float("nan")
        small = fxprune.compact(pruned, X, verify=False)
        return {name: parameter.shape for name, parameter in small.named_parameters()}

    sound = halved(broken=False)
    with pytest.warns(UserWarning, match=r"NaN or infinite numbers: qkv\.bias"):
        assert halved(broken=True) == sound


class AddedToPart(nn.Module):
    """A parameter that is added to a part of a constant: no slice of it has the sizes that the part has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.part = nn.Parameter(torch.tensor([2.0, -1.0, 3.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones(8)
        scale[1:5] += self.part
        return self.last((self.first(x) * scale).relu())


@pytest.mark.parametrize("gone", [[1, 2], [0, 3], [5, 6], [0, 1, 2, 3, 4]])
def test_a_parameter_that_cannot_be_cut_stays_alone(gone: list[int]) -> None:
    torch.manual_seed(0)
    model, x = AddedToPart(), torch.randn(3, 6)
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias, model.last.weight.t()):
            tensor[gone] = 0
    small = fxprune.compact(model, x)
    assert small.get_parameter("first.weight").shape == (8 - len(gone), 6)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    new = torch.randn(5, 6)
    assert torch.allclose(small(new), model(new), atol=1e-6)
    assert torch.allclose(small.train()(new), model(new), atol=1e-6)
