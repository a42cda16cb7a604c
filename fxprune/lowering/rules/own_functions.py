"""Autograd functions of a user's own: elementwise where a run on numbers shows it."""

from __future__ import annotations

from typing import Any

import torch

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
    given = torch.randn(shape, generator=generator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = context.target(given.clone(), *args)
        for axis, size in enumerate(shape):
            changed = given.clone()
            changed.narrow(axis, 0, 1).mul_(-8).add_(3)
            after = context.target(changed, *args)
            others_before, others_after = (y.narrow(axis, 1, size - 1) for y in (before, after))
            if not torch.equal(others_before, others_after):
                raise Unknown(f"{describe(context.target)} is not elementwise")
    floor = has_floor(context, (x, *args), {})
    return context.build.map_anew(x, floor=floor)
