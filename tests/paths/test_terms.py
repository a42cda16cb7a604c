"""Terms of products under masks: counted by hand, and as what compaction leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph import ChannelGraph
from fxprune.paths.terms import count_terms

TOKENS, HEADS, WIDTH = 3, 2, 2


class Attention(nn.Module):
    """Two heads of two channels over three tokens."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = (q @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def graph_of(bias: bool = False) -> ChannelGraph:
    return fxprune.lower(fxprune.capture(Attention(bias), torch.ones(1, TOKENS, 4)))


def without(rows: list[int] = (), columns: list[int] = ()) -> Tensor:  # type: ignore[assignment]
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[list(rows)] = False
    mask[:, list(columns)] = False
    return mask


PAIRS = TOKENS * TOKENS
WHOLE = PAIRS * HEADS * WIDTH
CASES: list[tuple[str, dict[str, Tensor], tuple[int, int]]] = [
    ("dense", {}, (WHOLE, WHOLE)),
    ("a query channel", {"q.weight": without([1])}, (WHOLE - PAIRS, WHOLE)),
    ("a key channel", {"k.weight": without([2])}, (WHOLE - PAIRS, WHOLE)),
    ("a value channel", {"v.weight": without([3])}, (WHOLE, WHOLE - PAIRS)),
    ("a channel that nobody reads", {"out.weight": without(columns=[0])}, (WHOLE, WHOLE - PAIRS)),
    (
        "a head that nobody reads",
        {"out.weight": without(columns=[0, 1])},
        (WHOLE - 2 * PAIRS, WHOLE - 2 * PAIRS),
    ),
    ("the queries of a head", {"q.weight": without([0, 1])}, (WHOLE - 2 * PAIRS, WHOLE)),
    ("all values", {"v.weight": without([0, 1, 2, 3])}, (0, 0)),
]


@pytest.mark.parametrize(("name", "masks", "expected"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("resolution", ["spatial", "channel"])
def test_attention_by_hand(name: str, masks: Any, expected: tuple[int, int], resolution: Any) -> None:
    graph = graph_of()
    assert tuple(count_terms(graph, masks, resolution=resolution).values()) == expected


def test_a_bias_keeps_its_products_with_what_depends_on_the_input() -> None:
    scores, _ = count_terms(graph_of(bias=True), {"q.weight": without([1])}).values()
    assert scores == WHOLE


class Filtered(nn.Module):
    """A fixed filter between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)
        self.register_buffer("filter", torch.ones(4, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(nn.functional.conv2d(self.one(x), self.filter, groups=4))
        return y


def test_a_fixed_filter_counts_the_channels_on_paths() -> None:
    graph = fxprune.lower(fxprune.capture(Filtered(), torch.ones(2, 3, 5, 5)))
    one, two = (torch.ones(graph.kernels[f"{n}.weight"].shape, dtype=torch.bool) for n in ("one", "two"))
    one[0], two[:, 1] = False, False
    for resolution in ("spatial", "channel"):
        whole, left = (
            next(iter(count_terms(graph, masks, resolution=resolution).values()))  # type: ignore[arg-type]
            for masks in ({}, {"one.weight": one, "two.weight": two})
        )
        assert left == whole / 2
    assert whole == 2 * 4 * 4 * 4 * 4 or resolution == "channel"


def test_a_network_without_products() -> None:
    assert count_terms(fxprune.lower(fxprune.capture(nn.Linear(2, 2), torch.ones(1, 2))), {}) == {}
