"""Norms: paths pass as they are; the op names the axes along which entries share a statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.capture.narrowed_norms import NarrowedGroupNorm, NarrowedLayerNorm, NarrowedRMSNorm
from fxprune.graph import ir
from fxprune.lowering.rules.table import Context, RuleTable

__all__ = ["OF_LAST_AXES", "table"]

table = RuleTable()

OF_LAST_AXES = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}


def _norm(
    context: Context,
    x: Any,
    axes: Sequence[int],
    *,
    bias: Any,
    eps: Any,
    others: Sequence[Any] = (),
    channel: int | None = None,
    groups: int = 1,
) -> ir.Value:
    """Write the norm; ``others`` are its scale and running statistics, along axis ``channel`` or the last
    axes.
    """
    value = context.build.materialise(x)
    number = float(eps) if isinstance(eps, (int, float)) else None
    output = context.build.norm(value, axes, groups=groups, bias=bias is not None, eps=number)
    for operand in (*others, bias):
        context.build.read(output, operand, None if channel is None else [(output.index, channel)])
    return output


def _positions(x: Any, first: int = 2) -> range:
    return range(first, len(x.shape))


# -- modules -------------------------------------------------------------------------------------
@table.rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm_module(context: Context, x: Any) -> ir.Value:
    """``%1 = Norm(%0)``: running statistics in evaluation, those of the batch if the module keeps none."""
    m: Any = context.module
    axes = () if m.running_mean is not None else (0, *_positions(x))
    others = (m.weight, m.running_mean, m.running_var)
    return _norm(context, x, axes, bias=m.bias, eps=m.eps, others=others, channel=1)


@table.rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_module(context: Context, x: Any) -> ir.Value:
    """``%1 = Norm(%0) over positions``; a single sample has no batch axis."""
    m: Any = context.module
    rank = 3 + (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d).index(context.target)
    channel = 1 - (rank - len(x.shape))
    axes = () if m.running_mean is not None else _positions(x, channel + 1)
    others = (m.weight, m.running_mean, m.running_var)
    return _norm(context, x, axes, bias=m.bias, eps=m.eps, others=others, channel=channel)


@table.rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(context: Context, x: Any) -> ir.Value:
    """``%1 = Norm(%0) over the normalised axes``."""
    m: Any = context.module
    axes = range(-len(m.normalized_shape), 0)
    return _norm(context, x, axes, bias=getattr(m, "bias", None), eps=m.eps, others=(m.weight,))


@table.rule(nn.GroupNorm)
def group_norm_module(context: Context, x: Any) -> ir.Value:
    """``%1 = Norm(%0) over channels of a group and positions``."""
    m: Any = context.module
    return _norm(
        context,
        x,
        _positions(x, 1),
        bias=m.bias,
        eps=m.eps,
        others=(m.weight,),
        channel=1,
        groups=m.num_groups,
    )


@table.rule(NarrowedLayerNorm, NarrowedRMSNorm)
def narrowed_layer_norm(context: Context, x: Any, weight: Any = None, bias: Any = None) -> ir.Value:
    """``%1 = Norm(%0) over the last axis``, some of whose entries are gone."""
    m: Any = context.module
    return _norm(context, x, (-1,), bias=bias, eps=m.eps, others=(weight,))


@table.rule(NarrowedGroupNorm)
def narrowed_group_norm(context: Context, x: Any, weight: Any = None, bias: Any = None) -> ir.Value:
    """``%1 = Norm(%0) over channels of a group and positions``, some of which are gone."""
    m: Any = context.module
    others, groups = (weight,), len(m.total)
    return _norm(context, x, _positions(x, 1), bias=bias, eps=m.eps, others=others, channel=1, groups=groups)


# -- functions -----------------------------------------------------------------------------------
@table.rule(F.batch_norm)
def batch_norm(
    context: Context,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-05,
) -> ir.Value:
    axes = () if running_mean is not None else (0, *_positions(input))
    others = (weight, running_mean, running_var)
    return _norm(context, input, axes, bias=bias, eps=eps, others=others, channel=1)


@table.rule(torch.batch_norm)
def aten_batch_norm(
    context: Context, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *args: Any
) -> ir.Value:
    eps = args[2] if len(args) > 2 else None
    axes = () if running_mean is not None else (0, *_positions(input))
    others = (weight, running_mean, running_var)
    return _norm(context, input, axes, bias=bias, eps=eps, others=others, channel=1)


@table.rule(F.instance_norm)
def instance_norm(
    context: Context,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0.1,
    eps: Any = 1e-05,
) -> ir.Value:
    axes = _positions(input) if use_input_stats is not False or running_mean is None else ()
    others = (weight, running_mean, running_var)
    return _norm(context, input, axes, bias=bias, eps=eps, others=others, channel=1)


@table.rule(torch.instance_norm)
def aten_instance_norm(
    context: Context, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *args: Any
) -> ir.Value:
    own, eps = (args[0] if args else True), (args[2] if len(args) > 2 else None)
    axes = _positions(input) if own is not False or running_mean is None else ()
    others = (weight, running_mean, running_var)
    return _norm(context, input, axes, bias=bias, eps=eps, others=others, channel=1)


@table.rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    context: Context,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 1e-05,
    cudnn_enable: Any = True,
) -> ir.Value:
    return _norm(context, input, range(-len(normalized_shape), 0), bias=bias, eps=eps, others=(weight,))


@table.rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    context: Context, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> ir.Value:
    return _norm(context, input, range(-len(normalized_shape), 0), bias=None, eps=eps, others=(weight,))


@table.rule(F.group_norm, torch.group_norm)
def group_norm(
    context: Context,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 1e-05,
    cudnn_enabled: Any = True,
) -> ir.Value:
    return _norm(
        context,
        input,
        _positions(input, 1),
        bias=bias,
        eps=eps,
        others=(weight,),
        channel=1,
        groups=num_groups,
    )


@table.rule(nn.LocalResponseNorm, F.local_response_norm)
def local_response_norm(context: Context, input: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = x / (k + sum of squares of the neighbouring channels)^beta``."""
    return _norm(context, input, (1,), bias=None, eps=None)


@table.rule(F.normalize)
def normalize(
    context: Context, input: Any, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: Any = None
) -> ir.Value:
    """``y = x / |x|``, the length taken along ``dim``."""
    axes = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    return _norm(context, input, axes, bias=None, eps=eps)
