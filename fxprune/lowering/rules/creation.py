"""Tensors that code makes, and memory that it writes in full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxprune.capture.tracer.spelling import DRAWN_INTO
from fxprune.graph import ir
from fxprune.lowering.constant import Constant, unknown_numbers
from fxprune.lowering.rules.table import Context, RuleTable

__all__ = ["table"]

table = RuleTable()


@table.rule("copy_")
def copy(context: Context, x: Any, source: Any, *args: Any) -> ir.Value:
    """Overwrite what was there."""
    return context.build.affine(context.build.materialise(source), context.shape)


@table.rule("new_empty", torch.empty_like)
def empty(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """Memory without numbers: present nowhere until something is written into it."""
    blank: Constant = zeros(context, x)
    return replace(blank, is_empty=torch.Size(context.shape).numel() > 0)


@table.rule("new_zeros", "zero_", torch.zeros_like)
def zeros(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """A tensor of zeros: present nowhere until something is written into it."""
    shape, dtype = context.shape, context.result.dtype
    return Constant(shape, dtype, lambda: torch.zeros(shape, dtype=dtype), zero=True)


@table.rule(torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, "bernoulli")
@table.rule(*sorted(DRAWN_INTO))
def random(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """Random numbers: present everywhere, on no path."""
    return Constant(context.shape, context.result.dtype, unknown_numbers)


@table.rule("new_ones", "new_full", "new_tensor", "fill_", torch.ones_like, torch.full_like)
def constants(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """Present everywhere, on no path."""
    shape, dtype = context.shape, context.result.dtype
    return Constant(shape, dtype, lambda: torch.ones(shape, dtype=dtype))
