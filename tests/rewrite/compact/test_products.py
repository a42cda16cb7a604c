"""Removed channels of products and sums that hold numbers although no path reaches them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

import fxprune


class Block(nn.Module):
    """Attention of two heads behind a layer norm, with biases everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.norm(y)
        q, k, v = (layer(z).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.last(y + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class Summed(nn.Module):
    """A sum over channels, some of which hold a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).sum(-1, keepdim=True))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_masks_without_structure_on_attention_behind_a_norm(sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Block().eval(), torch.randn(3, 5, 6)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.1, 1.0)
    pruned = fxprune.apply(
        model, "random", sparsity, example_inputs=x, progress=False, on_collapse="repair", seed=seed
    )
    small = fxprune.compact(pruned, x)
    with torch.no_grad():
        new = torch.randn(4, 7, 6)
        assert torch.allclose(small(new), pruned(new), atol=1e-5)


def test_a_sum_over_channels_keeps_their_biases() -> None:
    torch.manual_seed(0)
    model, x = Summed().eval(), torch.randn(3, 4)
    with torch.no_grad():
        model.one.weight[:3].zero_()
    small = fxprune.compact(model, x)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-6)
        model.one.bias[:3].zero_()
    assert fxprune.compact(model, x).get_parameter("one.weight").shape == (5, 4)


class Queries(nn.Module):
    """Attention of two heads, by hand or fused, with a softmax over keys or over queries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "fused":
            y = scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / 2).softmax(-1 if self.kind == "keys" else -2) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["fused", "keys", "queries"])
@pytest.mark.parametrize("constant", ["q", "k"])
def test_a_constant_key_goes_with_its_query(kind: str, constant: str) -> None:
    """A softmax over keys does not see what all keys have in common; one over queries sees it.

    The other of the two reads what is a constant but for the norm, so that no path reaches either.
    """
    torch.manual_seed(0)
    model, x = Queries(kind), torch.randn(3, 5, 6)
    with torch.no_grad():
        model.stem.weight[[2, 5]] = 0
        model.get_submodule(constant).weight[[1, 6]] = 0
        other = model.get_submodule("q" if constant == "k" else "k").weight
        kept = other[[1, 6]][:, [2, 5]]
        other[[1, 6]] = 0
        other[1, [2, 5]], other[6, [2, 5]] = kept
    small = fxprune.compact(model, x)
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), atol=1e-6)
    goes = (constant == "k") == (kind != "queries")
    assert small.get_submodule("q").out_features == (6 if goes else 8)


class LinearAttention(nn.Module):
    """Attention without a softmax, whose queries and keys are positive: one where a head has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.out = nn.Linear(8, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).unbind(2)
        q, k = elu(q) + 1, elu(k) + 1
        size = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        y = torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v)) / size.unsqueeze(-1)
        return self.last(x + self.out(y.flatten(2)))


def test_a_head_goes_whose_queries_and_keys_are_ones() -> None:
    torch.manual_seed(0)
    model, x = LinearAttention(), torch.randn(2, 7, 8)
    with torch.no_grad():
        for layer in (model.qkv.weight, model.qkv.bias):
            layer.view(3, 3, 4, -1)[:, 1] = 0
        model.out.weight.view(12, 3, 4)[:, 1] = 0
    small = fxprune.compact(model, x)
    assert small.get_parameter("qkv.weight").shape == (24, 12)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    new = torch.randn(3, 5, 8)
    assert torch.allclose(small(new), model(new), atol=1e-5)


def test_a_channel_of_a_head_that_is_left_counts() -> None:
    torch.manual_seed(0)
    model, x = LinearAttention(), torch.randn(2, 7, 8)
    with torch.no_grad():
        for layer in (model.qkv.weight, model.qkv.bias):
            layer.view(3, 3, 4, -1)[:2, :, 1] = 0
    small = fxprune.compact(model, x)
    new = torch.randn(3, 5, 8)
    assert torch.allclose(small(new), model(new), atol=1e-5)


class AttendsToSome(nn.Module):
    """Scores the rows that a mask picks by products of two layers: each run has another number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        x = x[chosen > 0]
        scores = (self.first(x) * self.second(x)).sum(-1, keepdim=True).softmax(0)
        result: Tensor = self.last(self.value(x) * scores).sum(0)
        return result


def test_products_of_rows_that_a_mask_picks() -> None:
    torch.manual_seed(0)
    model, inputs = AttendsToSome().eval(), (torch.randn(9, 6), torch.tensor([0, 1, 3, 0, 1, 0, 1, 5, 0]))
    pruned = fxprune.apply(
        model, "magnitude", 0.4, granularity="channel", example_inputs=inputs, progress=False
    ).eval()
    small = fxprune.compact(pruned, inputs)
    assert len(small.get_parameter("value.weight")) < 8
    for rows in (inputs, (torch.randn(30, 6), torch.arange(30) % 3)):
        assert torch.allclose(small(*rows), pruned(*rows), atol=1e-5)
