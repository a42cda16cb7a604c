"""Attention, recurrence and Fourier transforms, each from its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oracle_rules.duals import (
    RULES,
    Dual,
    Rule,
    Setting,
    UnknownOpError,
    constant,
    linear_map,
    never_zero,
    product,
    rule,
    scaled,
    total,
)
from oracle_rules.moves import move
from oracle_rules.pointwise import softmax
from oracle_rules.products import add, linear, matmul


@rule("scaled_dot_product_attention")
def attention(
    setting: Setting, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False, **kwargs: Any,
) -> Dual:  # fmt: skip
    """(1 + QK^T + mask) V; where a mask says -inf or False the pair is Zero."""
    if enable_gqa:
        copies = query.shape[-3] // key.shape[-3]
        key, value = (move(setting, torch.repeat_interleave, (t, copies, -3), {}) for t in (key, value))
    scores = product(setting, lambda q, k: q @ k.transpose(-2, -1), query, key)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        scores.blocked = ~attn_mask.expand(scores.shape)
    elif attn_mask is not None:
        scores = add(setting, scores, attn_mask)
    return matmul(setting, softmax(setting, scores), value)


@rule("multi_head_attention_forward")
def _multi_head(setting: Setting, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention`: (length, batch, width), or without the batch."""
    names = """embed_dim num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
    out_proj_weight out_proj_bias""".split()
    given = dict(zip(names, args, strict=True)) | kwargs
    for name in ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask"):
        if given.get(name) is not None or given["add_zero_attn"]:
            raise UnknownOpError("no rule for nn.MultiheadAttention with added or padded keys")

    def of(function: Any, x: Any, *more: Any) -> Any:
        return move(setting, function, (x, *more), {})

    if given.get("use_separate_proj_weight"):
        weights = [given[f"{letter}_proj_weight"] for letter in "qkv"]
    else:
        weights = of(torch.chunk, given["in_proj_weight"], 3)
    bias = given["in_proj_bias"]
    biases = (None, None, None) if bias is None else of(torch.chunk, bias, 3)

    def heads(x: Any, place: int) -> Any:
        x = linear(setting, x, weights[place], biases[place])
        x = of(Tensor.reshape, x, (*x.shape[:-1], given["num_heads"], x.shape[-1] // given["num_heads"]))
        return of(torch.movedim, x, 0, -2)  # (batch, heads, length, width of a head)

    q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
    mask = given.get("attn_mask")
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = ~mask  # here True means "may not attend"
    mixed = attention(setting, q, k, v, mask, is_causal=mask is None and given.get("is_causal", False))
    mixed = of(torch.movedim, mixed, -2, 0)
    result = linear(
        setting,
        of(Tensor.reshape, mixed, (*mixed.shape[:-2], -1)),
        given["out_proj_weight"],
        given["out_proj_bias"],
    )
    if not given.get("need_weights", True):
        return result, None
    return result, never_zero(product(setting, lambda a, b: a @ b.transpose(-2, -1), q, k))


@rule("lstm")
def _lstm(
    setting: Setting, input: Any, state: Any, weights: Any, has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Dual, None, None]:  # fmt: skip
    """`nn.LSTM`; the gates are sigmoids, hence never Zero."""
    step = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    if len(weights) != step * directions * layers:
        raise UnknownOpError("no rule for nn.LSTM with projections")
    time = 1 if batch_first else 0
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            start = step * (layer * directions + direction)
            outputs.append(
                _scan(setting, input, weights[start : start + step], time, backward=direction == 1)
            )
        input = move(setting, torch.cat, (outputs, -1), {})
    return input, None, None


def _scan(setting: Setting, x: Dual, weights: Sequence[Any], time: int, backward: bool) -> Dual:
    steps = list(move(setting, torch.unbind, (x, time), {}))
    hidden = cell = constant(setting, (*steps[0].shape[:-1], weights[1].shape[1]), 0.0)
    outputs = []
    for step in reversed(steps) if backward else steps:
        here = linear(setting, step, weights[0], *weights[2:3])
        gates = total(setting, here, linear(setting, hidden, weights[1], *weights[3:4]))
        take, keep, new, out = move(setting, torch.chunk, (gates, 4, -1), {})
        kept = scaled(setting, never_zero(keep), cell)
        cell = total(setting, kept, scaled(setting, never_zero(take), new))
        hidden = scaled(setting, never_zero(out), cell)
        outputs.append(hidden)
    return move(setting, torch.stack, (outputs[::-1] if backward else outputs, time), {})


def _fourier(name: str, axes: int | None) -> Rule:
    function = getattr(torch.fft, name)

    def transform(
        setting: Setting, input: Any, s: Any = None, dim: Any = None, norm: Any = None, n: Any = None
    ) -> Dual:
        """Every position along `dim` reaches every position."""
        if dim is None:
            dim = range(-axes, 0) if axes else range(input.dim())
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        real = torch.zeros(input.shape, dtype=torch.float64)
        example = real if name.startswith("rfft") else real.to(torch.complex128)
        shape = function(example, n if s is None else s, dims[0] if axes == 1 else dims).shape
        return linear_map(setting, input, lambda t: t.sum(dims, keepdim=True).expand(shape))

    return transform


for _name in ("rfft", "irfft", "fft", "ifft"):
    for _suffix, _axes in (("", 1), ("2", 2), ("n", None)):
        RULES[f"fft_{_name}{_suffix}"] = _fourier(_name + _suffix, _axes)


@rule("view_as_complex")
def _view_as_complex(setting: Setting, x: Dual) -> Dual:
    return linear_map(setting, x, lambda t: t.sum(-1))


@rule("view_as_real")
def _view_as_real(setting: Setting, x: Dual) -> Dual:
    return linear_map(setting, x, lambda t: torch.stack([t, t], -1))
