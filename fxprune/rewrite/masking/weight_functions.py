"""List the torch functions that multiply data with a weight, and find the weight among their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

KERNELS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    }
)
"""Functions called as ``f(input, weight, ...)``: their second argument is what a mask must reach."""

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.einsum,
        torch.matmul,
        torch.mm,
        torch.Tensor.__matmul__,
        torch.Tensor.__rmatmul__,
        torch.Tensor.bmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
    }
)
"""Functions in which a weight may stand in any place."""


def weight_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The weight that a call of one of :data:`KERNELS` was given."""
    return args[1] if len(args) > 1 else kwargs.get("weight")


def with_weight_operand(
    args: Sequence[Any], kwargs: Mapping[str, Any], weight: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the same call with ``weight`` in the weight's place."""
    if len(args) > 1:
        return (args[0], weight, *args[2:]), dict(kwargs)
    return tuple(args), {**kwargs, "weight": weight}
