"""Layers that make constants: position embeddings and tables of biases that a small network computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


class Embedded(nn.Module):
    """Tokens with a position embedding that a network makes of coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.hidden, self.position = nn.Linear(2, 6), nn.Linear(6, 8)
        self.register_buffer("places", torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        position = self.position(self.hidden(self.places).relu())
        y: Tensor = self.last((self.first(x) + position.unsqueeze(0)).relu())
        return y


class Biased(nn.Module):
    """Attention of three heads with biases that a network makes of coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 4)
        self.hidden, self.bias = nn.Linear(2, 6), nn.Linear(6, 3)
        self.register_buffer("places", torch.randn(25, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 3, 2).permute(2, 0, 3, 1, 4)
        bias = self.bias(self.hidden(self.places).relu()).view(5, 5, 3).permute(2, 0, 1)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y: Tensor = self.out(heads.transpose(1, 2).reshape(-1, 5, 6))
        return y


def drawn(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def sizes(small: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}


def test_channels_of_an_embedding_go_with_those_that_it_is_added_to() -> None:
    net, x = drawn(Embedded), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.first.weight[:3], net.last.weight[:, :3] = 0.0, 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert sizes(small)["position.weight"] == (5, 6)
    assert sizes(small)["first.weight"] == (5, 4)
    assert small.meta["fxprune"]["compaction"].given_back == 0


def test_hidden_channels_that_nothing_reads_go() -> None:
    net, x = drawn(Embedded), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.position.weight[:, [1, 4]] = 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert sizes(small)["hidden.weight"] == (4, 2)
    assert sizes(small)["position.weight"] == (8, 4)
    assert small.meta["fxprune"]["compaction"].given_back == 0


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_channels_that_are_pruned_all_go(sparsity: float) -> None:
    net, x = drawn(Embedded), torch.randn(2, 5, 4)
    pruned = fxprune.apply(
        net, "magnitude", sparsity, granularity="channel", example_inputs=x, progress=False
    )
    small = fxprune.compact(pruned)
    torch.testing.assert_close(small(x), pruned(x))
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert len(small.get_parameter("position.weight")) == len(small.get_parameter("first.weight"))


def test_biases_of_heads_stay_those_of_their_heads() -> None:
    """Nothing on a path leads to them, and one of them would fit all heads in shape."""
    net, x = drawn(Biased), torch.randn(2, 5, 6)
    with torch.no_grad():
        net.out.weight[:, :2] = 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    assert sizes(small)["bias.weight"] == (3, 6)


class Lookup(nn.Module):
    """Vectors of bounded length, by an index that is given or that is a constant."""

    def __init__(self, kind: type[nn.Module], constant: bool) -> None:
        super().__init__()
        self.table, self.other, self.head = kind(10, 6, max_norm=1.0), nn.Embedding(10, 6), nn.Linear(6, 3)
        self.constant = constant

    def forward(self, index: Tensor) -> Tensor:
        places = torch.arange(10).view(1, 10) if self.constant else index
        found = self.table(places)
        if found.dim() == 2:
            found = found[:, None]
        both = self.other(index) + (found[:, :1] if self.constant else found)
        out: Tensor = self.head(both)
        return out


@pytest.mark.parametrize(
    ("kind", "constant"), [(nn.Embedding, False), (nn.Embedding, True), (nn.EmbeddingBag, False)]
)
def test_a_length_that_is_bounded_counts_all_channels(kind: type[nn.Module], constant: bool) -> None:
    torch.manual_seed(0)
    net = Lookup(kind, constant).eval()
    with torch.no_grad():
        net.head.weight[:, :3] = 0
    index = torch.arange(10)[None]
    expected = copy.deepcopy(net)(index)
    small = fxprune.compact(net, index[:, :3], verify=False)
    assert torch.allclose(small(index), expected, atol=1e-6)
