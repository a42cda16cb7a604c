"""Autograd functions of a user's own: elementwise where a run on numbers shows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.capture.tracer.call_targets import AutogradCall
from fxprune.graph import ir
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.pointwise import has_floor
from fxprune.lowering.rules.table import Context, RuleTable, Unknown, describe, tensors_in

__all__ = ["table"]

table = RuleTable()


@table.rule(AutogradCall)
def own_function(context: Context, x: Any, *args: Any) -> ir.Value:
    """A user's autograd function is elementwise if a changed slice changes that slice of the result alone."""
    shape = context.shape
    others = [a for a in tensors_in(args) if isinstance(a, (ir.Value, Constant))]
    if not isinstance(x, ir.Value) or x.shape != shape or others:
        raise Unknown(f"{describe(context.target)} is no function of one tensor that keeps its shape")
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if not all(_keeps_to_itself(context.target, given, args) for given in draws):
            raise Unknown(f"{describe(context.target)} is not elementwise")
    floor = has_floor(context, (x, *args), {})
    return context.build.map_anew(x, floor=floor)


def _keeps_to_itself(function: Any, given: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the first slice along every axis has no influence on the others."""
    before = function(given.clone(), *args)
    for axis, size in enumerate(given.shape):
        changed = given.clone()
        changed.narrow(axis, 0, 1).mul_(-8).add_(3)
        after = function(changed, *args)
        mine, other = (y.narrow(axis, 1, size - 1) for y in (before, after))
        # No number stays none: a square root has only some.
        if not torch.allclose(mine, other, rtol=0, atol=0, equal_nan=True):
            return False
    return True
