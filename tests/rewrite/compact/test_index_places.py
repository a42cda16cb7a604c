"""Lists of channels, as in permutations, and what is written over channels, follow the channels that go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.rewrite.compact.index_places import new_places

ORDER = [3, 1, 0, 2, 7, 6, 5, 4, 8, 9, 11, 10]
WIDTH = len(ORDER)


class Between(nn.Module):
    """Two convolutions, and a function of the channels between them."""

    order: Tensor
    mask: Tensor
    other: Tensor

    def __init__(self, between: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3)
        self.register_buffer("order", torch.tensor(ORDER))
        self.register_buffer("mask", torch.tensor(ORDER) > 2)
        self.register_buffer("other", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self, self.first(x)))
        return y


def by_entry(m: Between, h: Tensor) -> Tensor:
    return m.order.view(1, -1, 1, 1).expand(h.shape[0], -1, h.shape[2], h.shape[3])


def written(h: Tensor, index: Any, new: Any) -> Tensor:
    h[:, index] = new
    return h


BETWEEN: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "a buffer": lambda m, h: h[:, m.order],
    "a list": lambda m, h: h[:, ORDER],
    "a computed order": lambda m, h: h[:, m.order.flip(0)].relu()[:, torch.argsort(m.order)],
    "an order of sizes": lambda m, h: h[:, torch.arange(h.shape[1] - 1, -1, -1)],
    "the last axis": lambda m, h: h.movedim(1, -1)[..., m.order].movedim(-1, 1),
    "index_select": lambda m, h: h.index_select(1, m.order),
    "index_select by name": lambda m, h: torch.index_select(h, dim=-3, index=m.order),
    "take_along_dim": lambda m, h: torch.take_along_dim(h, m.order.view(1, -1, 1, 1), 1),
    "gather": lambda m, h: h.gather(1, by_entry(m, h)),
    "two parts": lambda m, h: torch.cat([h[:, m.order[:5]] * 2, h[:, m.order[5:]]], 1),
    "written by an order": lambda m, h: written(torch.zeros_like(h), m.order, h),
    "rolled": lambda m, h: h.roll(3, 1),
    "rolled by name": lambda m, h: torch.roll(h, shifts=-2, dims=-3).flip(1).roll(1, 1),
    "halves side by side": lambda m, h: torch.stack([h[:, :6], h[:, 6:]], 2).flatten(1, 2),
    "zeros over some": lambda m, h: written(h.clone(), slice(0, 5), 0),
    "zeros over a list": lambda m, h: written(h.clone(), [1, 3, 5], 0),
    "a number over one": lambda m, h: written(h.clone(), 3, 1.0),
    "index_fill": lambda m, h: h.index_fill(1, m.order[:4], 0.0),
    "where": lambda m, h: torch.where(m.mask[:, None, None], h, 0.0),
    "where, constants": lambda m, h: torch.where(m.mask[:, None, None], h, m.other[:, None, None]),
    "where, both": lambda m, h: torch.where(m.mask[:, None, None], h.relu(), h),
    "masked_fill": lambda m, h: h.masked_fill(m.mask[:, None, None], 0.0),
}


def made(kind: str) -> tuple[Between, Tensor]:
    torch.manual_seed(0)
    return Between(BETWEEN[kind]).eval(), torch.randn(3, 3, 6, 6)


@pytest.mark.every_case
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", BETWEEN)
def test_channel_masks_become_smaller_layers(kind: str, verify: bool) -> None:
    net, x = made(kind)
    pruned = fxprune.apply(net, "random", 0.3, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x, verify=verify)
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0, str(table)
    assert small.get_parameter("first.weight").shape[0] < WIDTH
    with torch.no_grad():
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


@pytest.mark.every_case
@pytest.mark.parametrize("kind", ["index_select", "gather", "take_along_dim", "index_fill", "rolled"])
def test_files_hold_them(kind: str, tmp_path: Path) -> None:
    net, x = made(kind)
    pruned = fxprune.apply(net, "random", 0.3, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    fxprune.save(small, tmp_path / "small")
    loaded = fxprune.load(tmp_path / "small", model=made(kind)[0])
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda h: h[:, ::2].mul_(2),
    "twice": lambda h: h[:, 1::2].mul_(2).add_(0.3),
    "one of pairs": lambda h: h.view(h.shape[0], 6, 2, 6, 6)[:, :, 0].mul_(2).add_(0.3),
    "one": lambda h: h[:, 3].mul_(2).add_(0.3),
    "the last": lambda h: h[:, -4:].mul_(2),
    "scattered": lambda h: h.scatter_(1, torch.tensor([1, 4]).view(1, 2, 1, 1).expand(3, 2, 6, 6), 0.5),
}


@pytest.mark.every_case
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_in_place_is_never_wrong(kind: str, seed: int) -> None:
    def between(m: Between, h: Tensor) -> Tensor:
        WRITTEN[kind](h)
        return h

    torch.manual_seed(0)
    net, x = Between(between).eval(), torch.randn(3, 3, 6, 6)
    pruned = fxprune.apply(
        net, "random", 0.4, granularity="channel", example_inputs=x, progress=False, seed=seed
    )
    small = fxprune.compact(pruned, x, verify=False)
    with torch.no_grad():
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


@pytest.mark.every_case
@pytest.mark.parametrize("kind", BETWEEN)
def test_zeros_in_weights_become_smaller_layers(kind: str) -> None:
    net, x = made(kind)
    with torch.no_grad():
        net.first.weight[[0, 3, 4, 9]] = 0
        net.first.bias[[0, 3, 4, 9]] = 0  # type: ignore[index]
        net.last.weight[:, [1, 4, 8]] = 0
        small = fxprune.compact(net, x)
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
    assert small.get_parameter("first.weight").shape[0] < WIDTH


def test_an_index_that_is_spread_like_the_channels_has_a_rule() -> None:
    net, x = made("gather")
    net.between = lambda m, h: torch.zeros_like(h).scatter(1, m.order.view(1, -1, 1, 1).expand_as(h), h)
    assert not fxprune.lower(fxprune.capture(net, x)).opaque


def test_a_decoder_that_reads_the_weight_of_the_encoder_has_groups() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu()).relu()
            h = F.conv_transpose2d(h, self.second.weight, None, 1, 1).relu()
            return F.conv_transpose2d(h, self.first.weight, None, 2, 1, 1)

    net, x = Tied().eval(), torch.randn(2, 3, 12, 12)
    pruned = fxprune.apply(net, "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert small.get_parameter("second.weight").numel() < net.second.weight.numel()
    with torch.no_grad():
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


def test_an_expert_without_rows_is_compacted() -> None:
    class Dispatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(12, 4), nn.Linear(6, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, 12)
            weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
            y = rows.new_zeros(rows.shape[0], 6)
            for number, expert in enumerate(self.experts):
                row, place = torch.where(chosen == number)
                y.index_add_(0, row, expert(rows[row]) * weights[row, place, None])
            out: Tensor = self.out(y).view(x.shape[0], -1, 3)
            return out

    torch.manual_seed(1)
    net, x = Dispatched().eval(), torch.randn(2, 7, 12)
    pruned = fxprune.apply(net, "synflow", 0.9, example_inputs=x, progress=False, rounds=5)
    small = fxprune.compact(pruned, x, verify=False)
    with torch.no_grad():
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


def test_places_of_what_is_left() -> None:
    kept = torch.tensor([True, False, True, True])
    net = nn.Module()
    assert new_places(net, [3, 1, 0, -2], kept) == [2, 0, 1]
    assert new_places(net, torch.tensor([True, True, False, True]), kept) == [0, 2]
    assert new_places(net, torch.tensor([[0, 1]]), kept) is None
    assert new_places(net, torch.tensor([0.5]), kept) is None
