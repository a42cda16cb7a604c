"""Norms: identity on paths; their bias makes a value present."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.capture import ModeSwitch
from fxprune.graph import ir
from fxprune.lowering.rules.table import Context, RuleTable

__all__ = ["table"]

table = RuleTable()

_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LocalResponseNorm,
)


@table.rule(*_MODULES)
def norm_module(context: Context, x: ir.Value) -> ir.Value:
    """``y = (x - mean) / std * weight + bias``: paths as they were."""
    value = context.build.materialise(x)
    return context.build.affine(value, bias=getattr(context.module, "bias", None) is not None)


@table.rule(F.batch_norm, torch.batch_norm, F.instance_norm)
def batch_norm(
    context: Context,
    x: Any,
    mean: Any = None,
    var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> ir.Value:
    return context.build.affine(context.build.materialise(x), bias=bias is not None)


@table.rule(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm)
def layer_norm(
    context: Context, x: Any, shape: Any = None, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> ir.Value:
    return context.build.affine(context.build.materialise(x), bias=bias is not None)


@table.rule(F.rms_norm, torch.rms_norm)
def rms_norm(context: Context, x: Any, *_: Any, **__: Any) -> ir.Value:
    return context.build.materialise(x)


@table.rule(ModeSwitch)
def mode_switch(context: Context, training: Any, evaluating: Any) -> Any:
    """Paths are those of evaluation."""
    return evaluating
