"""Contractions with a parameter: convolutions and linear layers of every rank and kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.reads import joined, lost
from fxprune.lowering.rules.contraction import contract
from fxprune.lowering.rules.table import Context, RuleTable, Unknown

__all__ = ["table"]

table = RuleTable()


def module_weight(context: Context, name: str = "weight") -> ir.WeightRef:
    """The parameter ``name`` of the module at hand."""
    tensor = getattr(context.module, "_parameters", {}).get(name)
    if tensor is None:
        raise Unknown(f"{context.build.layer} has no parameter {name!r}")
    ref = context.build.parameters.reference(tensor, context.module)
    return ref or ir.WeightRef(None, tuple(tensor.shape))


def operand(weight: Any) -> ir.WeightRef:
    """The weight operand of a functional call: a prunable parameter, or dense; zeros made in the forward
    stay.
    """
    if not isinstance(weight, Constant):
        raise Unknown("the weight depends on the input")
    if weight.weight is not None:
        return weight.weight
    numbers = None if weight.is_learnt else weight.numbers()
    if numbers is None or bool((numbers != 0).all()):
        return ir.WeightRef(None, weight.shape)
    pattern = (numbers != 0).float()
    return ir.WeightRef(None, weight.shape, TensorFunction.of(keep_pattern, PREVIOUS, pattern))


def keep_pattern(x: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Multiply with a pattern of zeros and ones, moved to the device and type of ``x``."""
    return x * pattern.to(x)


def _pairs(value: Any, rank: int) -> tuple[int, ...]:
    return (
        (int(value),) * rank
        if isinstance(value, int)
        else tuple(int(v) for v in value) * (rank if len(value) == 1 else 1)
    )


@table.rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def linear_module(context: Context, x: Any) -> ir.Value:
    """``y = x W^T + b``: one kernel per weight."""
    assert context.module is not None
    value = context.build.materialise(x)
    return context.build.linear(value, module_weight(context), bias=context.module.bias)


def _biased(context: Context, result: ir.Value, bias: Any, axis: int) -> ir.Value:
    """Add a bias along one axis, if there is one."""
    if bias is None:
        return result
    output = context.build.affine(result, bias=True)
    context.build.read(output, bias, [(output.index, axis)])
    return output


@table.rule(F.linear)
def linear(context: Context, x: Any, weight: Any, bias: Any = None) -> ir.Value:
    build = context.build
    value = build.materialise(x)
    if isinstance(weight, ir.Value) and len(weight.shape) != 2:
        raise Unknown("linear with a vector as weight")
    if isinstance(weight, ir.Value) or (isinstance(weight, Constant) and weight.joined is not None):
        letters = "abcdefgh"[: len(value.shape) - 1]
        result = contract(context, f"{letters}i,oi->{letters}o", value, weight, context.shape)
        return _biased(context, result, bias, len(result.shape) - 1)
    ref = operand(weight)
    if len(ref.shape) == 1:
        raise Unknown("linear with a vector as weight")
    return build.linear(value, ref, bias=bias, by=weight)


def _window(
    kernel: Any, stride: Any, padding: Any, dilation: Any, mode: str = "zeros", *, rank: int
) -> ir.Window:
    kernel, stride, dilation = tuple(kernel), _pairs(stride, rank), _pairs(dilation, rank)
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _pairs(padding, rank))
    return ir.Window(kernel, stride, pads, dilation, mode)


@table.rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv_module(context: Context, x: Any) -> ir.Value:
    """One kernel per (out, in / groups) pair, its taps the weights."""
    m: Any = context.module
    rank = len(m.kernel_size)
    window = _window(m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode, rank=rank)
    return context.build.conv(
        context.build.materialise(x),
        module_weight(context),
        context.shape,
        window=window,
        groups=m.groups,
        bias=m.bias,
    )


@table.rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    context: Context,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ir.Value:
    build, value = context.build, context.build.materialise(input)
    if isinstance(weight, ir.Value):  # a dynamic convolution
        options = (None, stride, padding, dilation, groups)
        product = TensorFunction.of(context.target, Operand(0), Operand(1), *options)
        result = build.mix("", value, weight, context.shape, product)
        return _biased(context, result, bias, 1)
    ref = operand(weight)
    rank = len(ref.shape) - 2
    window = _window(ref.shape[2:], stride, padding, dilation, rank=rank)
    return context.build.conv(value, ref, context.shape, window=window, groups=groups, bias=bias, by=weight)


def _transposed(kernel: Any, stride: Any, padding: Any, dilation: Any, output_padding: Any) -> ir.Window:
    rank = len(kernel)
    base = _window(kernel, stride, padding, dilation, rank=rank)
    return ir.Window(
        base.kernel, base.stride, base.padding, base.dilation, "zeros", True, _pairs(output_padding, rank)
    )


@table.rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose_module(context: Context, x: Any, output_size: Any = None) -> ir.Value:
    """The parameter is ``(in, out / groups, *taps)``; ``output_padding`` follows from the captured output
    shape.
    """
    m: Any = context.module
    value, shape = context.build.materialise(x), context.shape
    rank = len(m.kernel_size)
    extra = [
        shape[-rank + d]
        - (
            (value.shape[-rank + d] - 1) * m.stride[d]
            - 2 * m.padding[d]
            + m.dilation[d] * (m.kernel_size[d] - 1)
            + 1
        )
        for d in range(rank)
    ]
    window = _transposed(m.kernel_size, m.stride, m.padding, m.dilation, extra)
    ref = module_weight(context)
    return context.build.conv(value, ref, shape, window=window, groups=m.groups, bias=m.bias)


@table.rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    context: Context,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> ir.Value:
    ref = operand(weight)
    window = _transposed(ref.shape[2:], stride, padding, dilation, output_padding)
    value = context.build.materialise(input)
    return context.build.conv(value, ref, context.shape, window=window, groups=groups, bias=bias, by=weight)


@table.rule(nn.Bilinear, F.bilinear)
def bilinear(context: Context, a: Any, b: Any, weight: Any = None, bias: Any = None) -> ir.Value:
    """``y[o] = sum_ij a[i] W[o, i, j] b[j] + bias[o]``: a linear layer on all products."""
    build = context.build
    module: Any = context.module
    ref = operand(weight) if module is None else module_weight(context)
    made, rows, columns = ref.shape
    batch = "defgh"[: len(a.shape) - 1]
    pairs = build.mix(
        f"{batch}i,{batch}j->{batch}ij", build.materialise(a), build.materialise(b), (*a.shape, columns)
    )
    flat = TensorFunction.of("flatten", PREVIOUS, len(batch))
    pairs = build.gather(flat, [pairs], (*a.shape[:-1], rows * columns))
    view = (ref.view or TensorFunction()).then("flatten", PREVIOUS, 1)
    whole = ir.WeightRef(ref.name, (made, rows * columns), view, ref.direct, ref.computed, ref.scaled)
    return build.linear(pairs, whole, bias=bias if module is None else module.bias, by=weight)


@table.rule(nn.Embedding, nn.EmbeddingBag, F.embedding, F.embedding_bag, torch.embedding)
def embedding(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value | Constant:
    """Paths start where the network looks its input up, or adds up what it has found; the table itself is no
    kernel.
    """
    own = context.module is not None
    table_first = not own and isinstance(x, Constant) and context.target is torch.embedding
    given = [x, *args, *(kwargs[key] for key in ("input", "weight") if key in kwargs)]
    tokens, entries = (given[0], context.module.weight) if own else given[:2]  # type: ignore[union-attr]
    if table_first:
        tokens, entries = entries, tokens
    shape = context.shape
    mixes = _shortens(context, args, kwargs)
    if isinstance(tokens, ir.Value):
        value = context.build.source(shape)
        along = None if mixes else (value.index, len(shape) - 1)
        context.build.read(value, entries, [None, along])
        return value
    reads = context.build.reads_of(entries)
    if reads is not None and mixes:
        reads = lost([reads])
    elif reads is not None:
        # Of which rows are read nothing is known, where their numbers are not; all have the same channels.
        numbers = tokens.numbers()
        rows = torch.zeros(shape[:-1], dtype=torch.int64) if numbers is None else numbers
        reads = joined([reads], lambda _, own: own[rows])
    return Constant(shape, torch.float32, lambda: torch.ones(shape), is_learnt=True, reads=reads)


def _shortens(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a lookup divides vectors by their length where that is over ``max_norm``: by all channels."""
    if context.module is not None:
        return context.module.max_norm is not None
    longest = args[2] if len(args) > 2 else kwargs.get("max_norm")
    return longest is not None and context.target is not torch.embedding
