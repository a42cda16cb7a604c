"""Attention: layers that are small networks of their own, written out in ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.parameters import PROJECTIONS
from fxprune.lowering.rules.pointwise import plus_constant
from fxprune.lowering.rules.table import Context, RuleTable, Unknown
from fxprune.lowering.rules.weighted import module_weight, operand

__all__ = ["table"]

table = RuleTable()


@table.rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    context: Context,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """``softmax(Q K^T + mask) V``: a value keeps its paths, and gains those of the queries and keys of its
    head.
    """
    q, k, v = (context.build.materialise(x) for x in (query, key, value))
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        k, v = (_repeated(context, x, q.shape[-3]) for x in (k, v))
    mixed, _ = attend(context, q, k, v, (attn_mask,), is_causal=is_causal)
    return mixed


def _repeated(context: Context, x: ir.Value, heads: int) -> ir.Value:
    copies = heads // x.shape[-3]
    shape = (*x.shape[:-3], heads, *x.shape[-2:])
    return context.build.gather(TensorFunction.of("repeat_interleave", PREVIOUS, copies, -3), [x], shape)


def attend(
    context: Context, q: ir.Value, k: ir.Value, v: ir.Value, masks: Sequence[Any], *, is_causal: bool
) -> tuple[ir.Value, ir.Value]:
    """The mixed values and the attention that mixed them. A bool mask says which pairs may meet."""
    build = context.build
    batch = "ABCDEFGH"[: len(q.shape) - 2]
    outer = tuple(max(a, b) for a, b in zip(q.shape[:-2], k.shape[:-2], strict=True))
    shape = (*outer, q.shape[-2], k.shape[-2])
    scores = build.mix(f"{batch}qc,{batch}kc->{batch}qk", q, k, shape)
    allowed = [torch.ones(shape[-2:], dtype=torch.bool).tril()] if is_causal else []
    for mask in masks:
        if isinstance(mask, ir.Value):
            scores = build.sum([scores, mask], shape) if mask.live else scores
        elif isinstance(mask, Constant) and mask.dtype == torch.bool:
            numbers = mask.numbers()
            if numbers is None:
                raise Unknown("an attention mask whose numbers are not known")
            allowed.append(numbers)
        elif isinstance(mask, Constant):
            scores = plus_constant(_of_shape(context, shape), scores, mask)
    blocked = build.blocked.get(scores.index)
    weights = build.map(scores, floor=True, axes=(-1,))
    for pairs in ([] if blocked is None else [~blocked]) + allowed:
        weights = build.select(weights, pairs, shape)
    mixed = build.mix(f"{batch}qk,{batch}kv->{batch}qv", weights, v, (*outer, q.shape[-2], v.shape[-1]))
    return mixed, weights


def _of_shape(context: Context, shape: tuple[int, ...]) -> Context:
    """The same context, for a result that the network itself never names."""
    return Context(context.build, context.node, context.target, torch.empty(shape, device="meta"))


# -- nn.MultiheadAttention -----------------------------------------------------------------------
@table.rule(nn.MultiheadAttention)
def multihead_module(
    context: Context,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Projections, attention per head, output projection; weights are read from the module, not called."""
    m: Any = context.module
    if m.in_proj_weight is not None:
        refs = [module_weight(context, PROJECTIONS[0])]
    else:
        refs = [module_weight(context, name) for name in PROJECTIONS[1:]]
    out = context.build.parameters.reference(m.out_proj.weight, m.out_proj)
    out = out or ir.WeightRef(None, tuple(m.out_proj.weight.shape))
    biases = m.in_proj_bias, m.out_proj.bias
    return _multihead(
        context,
        (query, key, value),
        (*refs, out),
        biases,
        heads=m.num_heads,
        first=m.batch_first,
        masks=(attn_mask, key_padding_mask),
        added=(m.bias_k, m.bias_v, m.add_zero_attn),
        is_causal=is_causal,
    )


@table.rule(F.multi_head_attention_forward)
def multihead(
    context: Context, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """The functional form, (length, batch, width)."""
    names = """embed_dim num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
    out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask
    use_separate_proj_weight""".split()
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("static_k") is not None or given.get("static_v") is not None:
        raise Unknown("multi_head_attention_forward with keys or values given as they are")
    separate = given.get("use_separate_proj_weight")
    read = PROJECTIONS[1:] if separate else PROJECTIONS[:1]
    refs = [operand(given[name]) for name in (*read, "out_proj_weight")]
    biases = given.get("in_proj_bias"), given.get("out_proj_bias")
    return _multihead(
        context,
        (query, key, value),
        tuple(refs),
        biases,
        heads=given["num_heads"],
        first=False,
        masks=(given.get("attn_mask"), given.get("key_padding_mask")),
        added=(given.get("bias_k"), given.get("bias_v"), given.get("add_zero_attn", False)),
        is_causal=given.get("is_causal", False),
    )


def _multihead(
    context: Context,
    operands: tuple[Any, Any, Any],
    refs: tuple[ir.WeightRef, ...],
    biases: tuple[Any, Any],
    *,
    heads: int,
    first: bool,
    masks: tuple[Any, Any],
    added: tuple[Any, Any, bool],
    is_causal: bool,
) -> tuple[Any, Any]:
    build = context.build
    values = [build.materialise(x) for x in operands]
    batched = {
        value.index: _batched(context, value, first) for value in {v.index: v for v in values}.values()
    }
    q, k, v = (batched[value.index] for value in values)
    q, k, v = _projected(context, (q, k, v), refs[:-1], biases[0])
    more = (added[0] is not None) + bool(added[2])
    k, v = (_longer(context, x, own, bool(added[2])) for x, own in ((k, added[0]), (v, added[1])))
    q, k, v = (_heads(context, x, heads) for x in (q, k, v))
    sides = q.shape[0], heads, q.shape[-2], k.shape[-2]
    found = [_mask(context, mask, sides, more, i == 1) for i, mask in enumerate(masks)]
    mixed, weights = attend(context, q, k, v, found, is_causal=masks[0] is None and is_causal)
    batch, _, length, width = mixed.shape
    join = TensorFunction.of("transpose", PREVIOUS, 1, 2).then("flatten", PREVIOUS, 2)
    joined = build.gather(join, [mixed], (batch, length, heads * width))
    result = build.linear(joined, refs[-1], bias=biases[1])
    own = context.result[0]
    result = build.gather(_unbatched(own.dim(), first), [result], own.shape)
    attention = context.result[1]
    if attention is None:
        return result, None
    if attention.dim() == own.dim():  # averaged over heads
        weights = build.reduce(weights, "mean", (1,), False, (batch, *weights.shape[-2:]))
    reshape = TensorFunction.of("reshape", PREVIOUS, tuple(attention.shape))
    return result, build.gather(reshape, [weights], attention.shape)


def _mask(
    context: Context, mask: Any, sides: tuple[int, int, int, int], more: int, is_padding: bool
) -> ir.Value | Constant | None:
    """A mask over (batch, heads, queries, keys) as SDPA takes it, open for keys that were added."""
    if not isinstance(mask, (ir.Value, Constant)):
        return None
    batch, heads, queries, keys = sides
    own = (batch, 1, 1, keys - more) if is_padding else (batch, heads, queries, keys - more)
    if not is_padding and len(mask.shape) == 2:
        own = (1, 1, queries, keys - more)
    arrange = TensorFunction.of("reshape", PREVIOUS, own).then(F.pad, PREVIOUS, [0, more])
    shape = (*own[:-1], keys)
    if isinstance(mask, ir.Value):
        return context.build.gather(arrange, [mask], shape)

    def evaluate() -> Tensor:
        moved: Tensor = arrange(mask.evaluate())
        return ~moved if mask.dtype == torch.bool else moved  # here True means "may not attend"

    return Constant(shape, mask.dtype, evaluate, is_learnt=mask.is_learnt)


def _longer(context: Context, x: ir.Value, row: Any, has_zeros: bool) -> ir.Value:
    """Keys or values (batch, length, width) with a learnt row and a row of zeros at the end."""
    build, (batch, length, width) = context.build, x.shape
    if row is not None:
        if not isinstance(row, Constant):
            row = build.part(row, lambda whole: whole, row.shape)
        own = TensorFunction.of("expand", Operand(1), batch, 1, width)
        join = own.then(torch.cat, [Operand(0), PREVIOUS], 1)
        x = build.gather(join, [x, build.materialise(row)], (batch, length + 1, width))
    if has_zeros:
        shape = (batch, x.shape[1] + 1, width)
        x = build.gather(TensorFunction.of(F.pad, PREVIOUS, [0, 0, 0, 1]), [x], shape)
    return x


def _batched(context: Context, x: ir.Value, first: bool) -> ir.Value:
    """(batch, length, width), whatever the module's own order is."""
    if len(x.shape) == 2:
        return context.build.gather(TensorFunction.of("unsqueeze", PREVIOUS, 0), [x], (1, *x.shape))
    if first:
        return x
    length, batch, width = x.shape
    swap = TensorFunction.of("transpose", PREVIOUS, 0, 1)
    return context.build.gather(swap, [x], (batch, length, width))


def _unbatched(rank: int, first: bool) -> TensorFunction:
    if rank == 2:
        return TensorFunction.of("squeeze", PREVIOUS, 0)
    return TensorFunction() if first else TensorFunction.of("transpose", PREVIOUS, 0, 1)


def _projected(
    context: Context, inputs: tuple[ir.Value, ...], refs: tuple[ir.WeightRef, ...], bias: Any
) -> list[ir.Value]:
    """Queries, keys and values. One projection of one input is one linear layer, cut in three."""
    build = context.build
    q, k, v = inputs
    if len(refs) == 3:
        return [
            build.linear(x, ref, bias=build.part(bias, _thirds(i), ref.shape[:1]))
            for i, (x, ref) in enumerate(zip(inputs, refs, strict=True))
        ]
    width = refs[0].shape[0] // 3
    if q.index == k.index == v.index:
        whole = build.linear(q, refs[0], bias=bias)
        shape = (*q.shape[:-1], width)
        thirds = TensorFunction.of("chunk", PREVIOUS, 3, -1)
        return [build.gather(thirds.then(getitem, PREVIOUS, i), [whole], shape) for i in range(3)]
    return [
        build.linear(x, _third(refs[0], i), bias=build.part(bias, _thirds(i), (width,)))
        for i, x in enumerate(inputs)
    ]


def _thirds(i: int) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole.chunk(3)[i]


def _third(ref: ir.WeightRef, i: int) -> ir.WeightRef:
    whole = ref.view or TensorFunction()
    view = whole.then("chunk", PREVIOUS, 3).then(getitem, PREVIOUS, i)
    return ir.WeightRef(ref.name, (ref.shape[0] // 3, ref.shape[1]), view, ref.direct)


def _heads(context: Context, x: ir.Value, heads: int) -> ir.Value:
    batch, length, width = x.shape
    shape = (batch, heads, length, width // heads)
    split = TensorFunction.of("reshape", PREVIOUS, batch, length, heads, width // heads)
    return context.build.gather(split.then("transpose", PREVIOUS, 1, 2), [x], shape)
