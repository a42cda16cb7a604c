"""Derivatives of activations, which ``torch.func.grad`` and its like leave in a graph as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable, substitute

__all__ = ["table"]

table = RuleTable()

_ACTIVATIONS = """
    elu gelu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish sigmoid silu softplus tanh threshold
"""


@table.rule(*(f"aten.{name}_backward" for name in _ACTIVATIONS.split()))
def slope(context: Context, grad: Any, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``grad * f'(x)``: a product of two values. The slope at zero is found by evaluating there."""
    build, shape = context.build, context.shape

    def zero(item: ir.Value | Constant) -> Tensor:
        return torch.zeros((1,) * len(item.shape))

    around, options = substitute(args, zero), substitute(kwargs, zero)
    one = torch.ones((1,) * len(shape))
    floor = bool((context.target(one, torch.zeros_like(one), *around, **options) != 0).any())
    factor = build.map(build.materialise(x), floor=floor)
    return build.gate(build.materialise(grad), factor, shape)
