"""Copy models that ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["cast_numbers", "duplicate"]

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
EMPTIED = (dict, OrderedDict, set, list)
COPIED_BY = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
PICKLED_BY = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")

Model = TypeVar("Model", bound=nn.Module)


def duplicate(
    model: Model, shared: Iterable[torch.Tensor] = (), instead: Mapping[int, torch.Tensor] | None = None
) -> Model:
    """Copy a model, sharing the tensors in ``shared`` with the original.

    ``instead``: by the id of a tensor of the original, what the copy has in its place.

    Results that modules keep as plain attributes (position biases gathered once for evaluation) are copied as
    values: ``deepcopy`` refuses tensors that have a gradient function.

    >>> layer = nn.Linear(2, 1)
    >>> duplicate(layer, [layer.weight]).weight is layer.weight
    True
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    memo |= instead or {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    plain = [module for module in model.modules() if _has_no_own_way(module)]
    made = [(module, type(module).__new__(type(module))) for module in plain]
    memo |= {id(module): twin for module, twin in made}
    # Parts first: a module with a way of its own may read the copies of its parts.
    for module, twin in reversed(made):
        vars(twin).update({name: _copied(value, memo) for name, value in vars(module).items()})
    return copy.deepcopy(model, memo)


def _has_no_own_way(module: nn.Module) -> bool:
    """Whether ``deepcopy`` copies a module by its attributes alone."""
    kind = type(module)
    return (
        not any(hasattr(kind, name) for name in COPIED_BY)
        and not any(name in vars(module) for name in (*COPIED_BY, *PICKLED_BY))
        and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in PICKLED_BY)
        and kind not in copyreg.dispatch_table
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )


def _copied(value: object, memo: dict[int, object]) -> object:
    """Copy as ``deepcopy`` does; most attributes of a module are simple, or tables of hooks without any."""
    kind = type(value)
    if kind in SIMPLE:
        return value
    if kind in EMPTIED and not value:
        return memo.setdefault(id(value), kind())
    if isinstance(value, dict) and kind in EMPTIED and id(value) not in memo:
        table: Any = kind()
        memo[id(value)] = table
        table.update((name, _copied(item, memo)) for name, item in value.items())
        return table
    return copy.deepcopy(value, memo)


def cast_numbers(model: Model, dtype: torch.dtype) -> Model:
    """Bring the real numbers of a model to ``dtype``, and complex ones to its complex type, in place.

    ``Module.to`` with a real type makes complex numbers real, and ``Module.double`` leaves them as they are.

    >>> layer = nn.Linear(2, 1, dtype=torch.complex64)
    >>> cast_numbers(layer, torch.float64).weight.dtype
    torch.complex128
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model
