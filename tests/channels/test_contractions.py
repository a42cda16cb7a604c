"""Channels of attention: equally many of every head, or whole heads; right values by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from channels.grouping import Net, groups_of, tables


def _heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def _attend(net: Any, x: Tensor, spelling: str) -> Tensor:
    query, key, value = (_heads(layer(x), n) for layer, n in zip(net.layers, net.numbers, strict=True))
    if net.numbers[0] != net.numbers[1]:
        times = net.numbers[0] // net.numbers[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if spelling == "sdpa":
        out = F.scaled_dot_product_attention(query, key, value)
    elif spelling == "einsum":
        weights = torch.einsum("bhqc,bhkc->bhqk", query, key).softmax(-1)
        out = torch.einsum("bhqk,bhkc->bhqc", weights, value)
    elif spelling == "channels":  # cross-covariance: channels attend to channels
        out = ((query.transpose(-2, -1) @ key).softmax(-1) @ value.transpose(-2, -1)).transpose(-2, -1)
    elif spelling == "talking":
        scores = net.mix((query @ key.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = scores.softmax(-1) @ value
    elif spelling == "scaled":  # one learned number for every head
        out = ((query * net.scale) @ key.transpose(-2, -1)).softmax(-1) @ value
    else:
        out = (query @ key.transpose(-2, -1)).softmax(-1) @ value
    return net.out(out.transpose(1, 2).flatten(2))


def attention(spelling: str, heads: int = 2, shared: int = 2, **extra: Any) -> Net:
    """Heads of two channels on five tokens of width 6; `shared` heads of keys and values."""
    q, k, v = nn.Linear(6, 2 * heads), nn.Linear(6, 2 * shared), nn.Linear(6, 2 * shared)
    net = Net(lambda net, x: _attend(net, x, spelling), q=q, k=k, v=v, out=nn.Linear(2 * heads, 3), **extra)
    object.__setattr__(net, "layers", (q, k, v))
    object.__setattr__(net, "numbers", (heads, shared, shared))
    return net.eval()


def found(net: Net, whole_heads: bool) -> dict[str, list[int]]:
    own = tables(groups_of(net, torch.randn(2, 5, 6), whole_heads=whole_heads))
    return {name: own[name] for name in ("q", "k", "v", "mix", "out.in") if name in own}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spelling", ["matmul", "sdpa", "einsum", "scaled"])
def test_heads_keep_equally_many_channels(spelling: str) -> None:
    extra = {"scale": nn.Parameter(torch.ones(1, 2, 1, 1))} if spelling == "scaled" else {}
    net = attention(spelling, **extra)
    # Query and key channel c of both heads; value channel c of both heads with what reads it.
    assert found(net, whole_heads=False) == {
        "q": [0, 1, 0, 1], "k": [0, 1, 0, 1], "v": [2, 3, 2, 3], "out.in": [2, 3, 2, 3]
    }  # fmt: skip
    assert found(net, whole_heads=True) == {key: [0, 0, 1, 1] for key in ("q", "k", "v", "out.in")}


def test_grouped_queries_go_with_their_keys() -> None:
    net = attention("matmul", heads=4, shared=2)
    assert found(net, whole_heads=False) == {
        "q": [0, 1] * 4, "k": [0, 1] * 2, "v": [2, 3] * 2, "out.in": [2, 3] * 4
    }  # fmt: skip
    # Query heads 0 and 1 read key head 0.
    assert found(net, whole_heads=True) == {
        "q": [0] * 4 + [1] * 4, "k": [0, 0, 1, 1], "v": [0, 0, 1, 1], "out.in": [0] * 4 + [1] * 4
    }  # fmt: skip


def test_one_key_head_for_all_queries() -> None:
    net = attention("matmul", heads=2, shared=1)
    assert found(net, whole_heads=False) == {
        "q": [0, 1, 0, 1], "k": [0, 1], "v": [2, 3], "out.in": [2, 3, 2, 3]
    }  # fmt: skip


def test_channels_that_a_softmax_runs_over_go_in_whole_heads() -> None:
    net = attention("channels")
    for whole_heads in (False, True):
        heads = {key: [0, 0, 1, 1] for key in ("q", "k", "v", "out.in")}
        assert found(net, whole_heads=whole_heads) == heads


def test_talking_heads() -> None:
    net = attention("talking", mix=nn.Linear(2, 2))
    # The scores of a head are mixed into those of all: the heads before and behind the mix go apart.
    assert found(net, whole_heads=True) == {
        "q": [0, 0, 1, 1], "k": [0, 0, 1, 1], "v": [2, 2, 3, 3], "mix": [2, 3], "out.in": [2, 2, 3, 3]
    }  # fmt: skip
    assert found(net, whole_heads=False)["mix"] == [-1, -1]


def test_channels_that_are_summed_over_are_tied_and_nothing_else() -> None:
    net = Net(
        lambda net, x: net.out(net.a(x) @ net.b(x).transpose(1, 2)),
        a=nn.Linear(6, 3), b=nn.Linear(6, 3), out=nn.Linear(5, 2),
    )  # fmt: skip
    own = tables(groups_of(net, torch.randn(2, 5, 6)))
    assert own["a"] == own["b"] == [0, 1, 2]
    assert own["out.in"] == [-1] * 5


def test_a_flat_gram_matrix_holds_its_channels() -> None:
    # A channel of `first` is a row and a column of the matrix, no slice of it flattened.
    net = Net(
        lambda net, x: net.out((net.first(x).transpose(1, 2) @ net.first(x)).flatten(1)),
        first=nn.Linear(6, 3), out=nn.Linear(9, 2),
    )  # fmt: skip
    groups = groups_of(net, torch.randn(2, 5, 6))
    assert tables(groups)["first"] == [-1] * 3
    assert "flatten: channels along two axes become one axis" in groups.labels.reasons.values()
