"""Distances, angles and losses: numbers that compare two values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable, Unknown

__all__ = ["table"]

table = RuleTable()


def _difference(context: Context, a: Any, b: Any, shape: tuple[int, ...]) -> ir.Value:
    """``a - b``, each a value or a constant; what is read of the constant is noted."""
    build = context.build
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        return build.sum([a, b], shape)
    value, other = (a, b) if isinstance(a, ir.Value) else (b, a)
    if isinstance(other, Constant):
        return build.affine(value, shape, bias=not other.zero, by=other)
    return build.affine(value, shape, bias=other != 0)


@table.rule(torch.cdist)
def cdist(context: Context, a: Any, b: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y[i, j] = |a[i] - b[j]|``: both reach the distance, feature by feature."""
    build, shape = context.build, context.shape
    rows, columns = _with_axis(context, a, -2), _with_axis(context, b, -3)
    apart = _difference(context, rows, columns, (*shape, a.shape[-1]))
    return build.reduce(apart, "sum", (len(shape),), False, shape)


def _with_axis(context: Context, x: Any, axis: int) -> ir.Value:
    value = context.build.materialise(x)
    shape = list(value.shape)
    shape.insert(len(shape) + axis + 1, 1)
    return context.build.gather(TensorFunction.of("unsqueeze", PREVIOUS, axis), [value], shape)


@table.rule(F.pairwise_distance)
def pairwise_distance(
    context: Context,
    x1: Any,
    x2: Any = None,
    p: Any = 2.0,
    eps: Any = 1e-6,
    keepdim: bool = False,
    **more: Any,
) -> ir.Value:
    """``y = |a - b|`` along the last axis."""
    x2 = more.get("x2", x2)
    shape = tuple(torch.broadcast_shapes(x1.shape, x2.shape))  # type: ignore[no-untyped-call]
    apart = _difference(context, x1, x2, shape)
    return context.build.reduce(apart, "sum", (len(shape) - 1,), keepdim, context.shape)


@table.rule(F.cosine_similarity)
def cosine_similarity(
    context: Context, x1: Any, x2: Any = None, dim: int = 1, eps: float = 1e-8, **more: Any
) -> ir.Value:
    """``y = sum of a b / (|a| |b|)`` along an axis."""
    build, sides, x2 = context.build, [], more.get("x2", x2)
    shape = tuple(torch.broadcast_shapes(x1.shape, x2.shape))  # type: ignore[no-untyped-call]
    axis = dim % len(shape) - len(shape)
    for side in (x1, x2):
        value = build.materialise(side)
        sides.append(build.norm(value, (axis,)) if value.live and -axis <= len(value.shape) else value)
    product = build.gate(sides[0], sides[1], shape)
    return build.reduce(product, "sum", (len(shape) + axis,), False, context.shape)


@table.rule(torch.renorm, "renorm", "renorm_")
def renorm(context: Context, x: Any, p: Any, dim: int, maxnorm: Any) -> ir.Value:
    """Slices along an axis, each divided by its length."""
    value = context.build.materialise(x)
    axes = [d for d in range(len(value.shape)) if d != dim % len(value.shape)]
    return context.build.norm(value, axes)


# -- losses --------------------------------------------------------------------------------------
_LOSSES: dict[Callable[..., Any], type[nn.Module] | None] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.gaussian_nll_loss: nn.GaussianNLLLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.margin_ranking_loss: nn.MarginRankingLoss,
    F.cosine_embedding_loss: nn.CosineEmbeddingLoss,
    F.triplet_margin_loss: nn.TripletMarginLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.ctc_loss: nn.CTCLoss,
}


@table.rule(*_LOSSES, *(kind for kind in _LOSSES.values() if kind is not None))
def loss(context: Context, *args: Any, **kwargs: Any) -> ir.Value:
    """Every entry of what is compared reaches the loss, which is present also where all of them are Zero."""
    build, shape = context.build, context.shape
    values = [x for x in (*args, *kwargs.values()) if isinstance(x, ir.Value)]
    terms = []
    for value in values:
        here = build.map(value, floor=True)
        if shape == ():
            terms.append(build.reduce(here, "max", range(len(value.shape)), False, ()))
        elif value.shape == shape:
            terms.append(here)
        elif value.live:
            raise Unknown("a loss for each sample")
    return build.sum(terms, shape)
