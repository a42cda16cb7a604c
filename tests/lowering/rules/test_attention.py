"""Rules of attention and recurrence: every form against the oracle, or against the same thing by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import prunable, random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.paths.count import flow, reach
from lowering.agreement import assert_flow, assert_reach, lowered
from lowering.wrapped import Entries, check

TOKENS = (5, 8)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.roll(1, -1), x.flip(1), x.roll(3, -1)


def _sdpa(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(*_split(x), **options)


def _grouped_queries(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, 2)).transpose(1, 2)
    k = x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, k.flip(2), enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def _linear_attention(x: Tensor) -> Tensor:
    q, k, v = _split(x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(1).unsqueeze(-1) + 1e-6)


def _cross_covariance(x: Tensor) -> Tensor:
    q, k, v = (F.normalize(t.transpose(1, 2), dim=-1) for t in _split(x))
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)


def _rotary(x: Tensor) -> Tensor:
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)

    def turn(t: Tensor) -> Tensor:
        half = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
        return t * cos + half * sin

    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in _split(x))
    return F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).flatten(2)


class Biased(nn.Module):
    """A learnt bias per pair and head; talking heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 5, 5))
        self.talk, self.talk_after = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in _split(x))
        scores = q @ k.transpose(-2, -1) * 0.5 + self.table
        scores = self.talk(scores.permute(0, 2, 3, 1)).softmax(2)
        scores = self.talk_after(scores).permute(0, 3, 1, 2)
        return (scores @ v).transpose(1, 2).flatten(2)


FORMS: dict[str, Any] = {
    "sdpa": _sdpa(),
    "sdpa, causal": _sdpa(is_causal=True),
    "sdpa, bool mask": _sdpa(attn_mask=CAUSAL.flip(0)),
    "sdpa, -inf mask": _sdpa(attn_mask=torch.zeros(5, 5).masked_fill(~CAUSAL, -torch.inf)),
    "sdpa, finite mask": _sdpa(attn_mask=torch.zeros(5, 5).masked_fill(~CAUSAL, -100.0), scale=0.1),
    "grouped queries": _grouped_queries,
    "linear attention": _linear_attention,
    "cross covariance": _cross_covariance,
    "rotary": _rotary,
    "bias and talking heads": lambda: Biased(),
    "pooled queries": lambda x: F.scaled_dot_product_attention(x.mean(1, keepdim=True), x, x.flip(1)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FORMS)
def test_attention(name: str) -> None:
    check(FORMS[name], TOKENS)


class Called(nn.Module):
    """A module called as told, with layers of its own on both sides."""

    def __init__(self, inner: nn.Module, call: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        self.before, self.inner, self.call = nn.Linear(8, 8, bias=False), inner, call
        self.after = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self.inner, self.before(x)))


def compare(model: nn.Module, example: Tensor, *, counts: bool = True) -> None:
    graph = lowered(model, example)
    assert set(graph.kernels) == set(prunable(model))
    for seed, density in enumerate((0.8, 0.3)):
        masks = random_masks(model, density, seed)
        assert_reach(graph, model, example, masks)
        if counts:
            assert_flow(graph, model, example, masks)


def _mha(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, *args, **{"batch_first": True, **options})


BLOCKED = ~CAUSAL
MULTIHEAD: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "without weights": (_mha(), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "with weights": (_mha(), lambda m, x: m(x, x, x)[0]),
    "no bias": (_mha(bias=False), lambda m, x: m(x, x, x)[0]),
    "three inputs": (_mha(bias=False), lambda m, x: m(x, x.flip(1), x * 2)[0]),
    "length first": (_mha(batch_first=False), lambda m, x: m(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)),
    "kdim and vdim": (
        _mha(kdim=4, vdim=6, bias=False), lambda m, x: m(x, x[:, :3, :4], x[:, :3, 2:])[0]),
    "causal mask": (_mha(), lambda m, x: m(x, x, x, attn_mask=BLOCKED, need_weights=False)[0]),
    "causal by name": (
        _mha(), lambda m, x: m(x, x, x, attn_mask=BLOCKED, is_causal=True, need_weights=False)[0]),
    "-inf mask": (
        _mha(), lambda m, x: m(x, x, x, attn_mask=torch.zeros(5, 5).masked_fill(BLOCKED, -torch.inf))[0]),
    "cross": (_mha(bias=False), lambda m, x: m(x[:, :2], x, x)[0]),
    "one token": (_mha(), lambda m, x: m(x.mean(1, keepdim=True), x, x)[0].squeeze(1)),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead(name: str) -> None:
    make, call = MULTIHEAD[name]
    torch.manual_seed(0)
    compare(Called(make(), call), torch.randn(2, 5, 8))


@pytest.mark.parametrize("average", [True, False])
def test_returned_attention_is_an_output(average: bool) -> None:
    """The weights of the attention are the result: queries and keys reach it, values do not."""
    torch.manual_seed(0)
    model = Called(
        nn.MultiheadAttention(8, 2, bias=False, batch_first=True),
        lambda m, x: m(x, x, x, average_attn_weights=average)[1],
        width=5,
    )
    graph = lowered(model, torch.randn(2, 5, 8))
    found = reach(graph, {})["inner.in_proj_weight"]
    assert [bool(part.all()) for part in found.chunk(3)[:2]] == [True, True]
    assert not bool(found.chunk(3)[2].any())


def test_unbatched() -> None:
    """(length, width) is (1, length, width)."""
    torch.manual_seed(0)
    inner = nn.MultiheadAttention(8, 2, bias=False)

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    compare(Unbatched(), torch.randn(5, 8), counts=False)


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first, activation="gelu")
    compare(Called(layer, lambda m, x: m(x)), torch.randn(2, 5, 8))
    compare(Called(layer, lambda m, x: m(x, src_mask=BLOCKED)), torch.randn(2, 5, 8))


@pytest.mark.slow
def test_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, bias=False)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    compare(Called(encoder, lambda m, x: m(x)), torch.randn(2, 5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    compare(Called(layer, lambda m, x: m(x[:, :3], x)), torch.randn(2, 5, 8))
    compare(
        Called(layer, lambda m, x: m(x, x.flip(1), tgt_mask=BLOCKED, tgt_is_causal=True)),
        torch.randn(2, 5, 8),
    )


class ByHand(nn.MultiheadAttention):
    """The same layer, batch first, written out with a learnt row and a row of zeros after the keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, padding: Any = None) -> Tensor:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        for row in (self.bias_k,) if self.bias_k is not None else ():
            k = torch.cat([k, row.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, torch.zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
        more = k.shape[1] - 5
        allowed = torch.ones(q.shape[0], 2, q.shape[1], k.shape[1], dtype=torch.bool)
        if attn_mask is not None:
            heads = (2, 2) if attn_mask.dim() == 3 else (1, 1)
            allowed = allowed & ~F.pad(attn_mask, (0, more)).reshape(*heads, q.shape[1], k.shape[1])
        if padding is not None:
            allowed = allowed & ~F.pad(padding, (0, more))[:, None, None]
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


PADDING = torch.tensor([[False] * 5, [False, False, True, False, True]])
PER_HEAD = torch.stack([BLOCKED, BLOCKED.T, BLOCKED, torch.zeros_like(BLOCKED)])
ADDED: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "padded keys": ({}, None, PADDING),
    "padded keys and causal": ({}, BLOCKED, PADDING),
    "a mask per head": ({"bias": False}, PER_HEAD, None),
    "learnt row": ({"add_bias_kv": True}, None, None),
    "learnt row, masked": ({"add_bias_kv": True, "bias": False}, BLOCKED, PADDING),
    "row of zeros": ({"add_zero_attn": True, "bias": False}, BLOCKED, None),
    "both rows": ({"add_zero_attn": True, "add_bias_kv": True, "bias": False}, BLOCKED, PADDING),
    "both rows, other keys": ({"kdim": 4, "vdim": 6, "add_bias_kv": True, "bias": False}, None, PADDING),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ADDED)
def test_padded_and_added_keys(name: str) -> None:
    """The oracle runs the layer written out by hand."""
    options, mask, padding = ADDED[name]
    options = {"batch_first": True, **options}

    def inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x, x[..., :4], x[..., 2:]) if "kdim" in options else (x, x.flip(1), x.roll(1, 1))

    torch.manual_seed(0)
    model = Called(
        nn.MultiheadAttention(8, 2, **options),
        lambda m, x: m(*inputs(x), attn_mask=mask, key_padding_mask=padding)[0],
    )
    by_hand = Called(ByHand(8, 2, **options), lambda m, x: m(*inputs(x), attn_mask=mask, padding=padding))
    example = torch.randn(2, 5, 8)
    graph = lowered(model, example)
    for seed, density in enumerate((0.8, 0.3)):
        masks = random_masks(model, density, seed)
        assert_reach(graph, by_hand, example, masks)
        assert_flow(graph, by_hand, example, masks)


def test_padding_that_is_an_input_says_nothing_of_paths() -> None:
    """Any key may be met, for it is known in use only which are padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    graph = lowered(layer, (torch.randn(2, 5, 8), None, PADDING))
    assert all(bool(mask.all()) for mask in reach(graph, {}).values())


def test_dead_heads_by_hand() -> None:
    """Heads whose keys are dead mix uniformly: values flow, queries do not (entries told apart)."""
    model = Entries(_sdpa(), TOKENS)
    graph = lowered(model, model.example())
    assert flow(graph, {}, dtype=torch.float64).log_total > 0
    masks = {"before.weight": torch.zeros(40, 4, dtype=torch.bool)}
    assert not any(bool(mask.any()) for mask in reach(graph, masks).values())
