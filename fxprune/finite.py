"""Name the parameters of a network that hold NaN or infinite numbers."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxprune.sharded_types import is_dtensor

__all__ = ["strange_parameters", "warn_of_strange_parameters"]

LISTED = 3
"""How many names a warning has."""


def strange_parameters(model: nn.Module) -> list[str]:
    """Return the names of parameters with numbers that are NaN or infinite.

    Parameters without values or without a shape yet, those that are split over processes, and those of a kind
    that PyTorch does not compare, are not looked at.

    >>> net = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = net.weight[0, 1].fill_(float("nan"))
    >>> strange_parameters(net)
    ['weight']
    """
    found = []
    for name, parameter in model.named_parameters():
        # A DTensor would ask all processes.
        if is_lazy(parameter) or parameter.is_meta or is_dtensor(parameter):
            continue
        try:
            is_strange = not _is_finite(parameter.detach())
        except RuntimeError:  # nested tensors, and shapes without numbers
            continue
        if is_strange:
            found.append(name)
    return found


def warn_of_strange_parameters(model: nn.Module, outcome: str, *, stacklevel: int) -> None:
    """Warn (``UserWarning``) where parameters hold NaN or infinite numbers; ``outcome`` says what follows."""
    names = strange_parameters(model)
    if names:
        rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        warnings.warn(
            f"model: parameters hold NaN or infinite numbers: {', '.join(names[:LISTED])}{rest}; {outcome}",
            stacklevel=stacklevel + 1,
        )


def _is_finite(values: Tensor) -> bool:
    if values.layout is not torch.strided and not values.is_nested and not values.is_mkldnn:
        values = values.coalesce().values() if values.is_sparse else values.values()
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return True
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    try:
        low, high = values.aminmax()  # one pass without a tensor of bools, and NaN comes through
    except NotImplementedError:  # types of eight bits
        return bool(torch.isfinite(values.float()).all())
    return math.isfinite(low) and math.isfinite(high)
