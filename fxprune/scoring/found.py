"""Take apart and check the result of a method: masks, or masks and new values of the weights they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxprune.scoring.contract import Method, Problem, Weights
from fxprune.sparsity.masks import Masks

__all__ = ["new_weights", "separate"]


def separate(found: Any) -> tuple[Any, Any]:
    """Return the masks and the weights of a method's result; no weights where it gives masks alone.

    >>> separate({"fc.weight": torch.tensor([[True]])})
    ({'fc.weight': tensor([[True]])}, {})
    """
    if isinstance(found, tuple) and len(found) == 2:
        return found
    return found, {}


def new_weights(method: Method, given: Any, masks: Masks, problem: Problem) -> Weights:
    """Check the new weights that ``method`` found, and return them: what ``masks`` prune has its old value.

    Raises ``TypeError`` for weights that are no dict of floating-point tensors; ``ValueError`` for a wrong
    name or shape, for kept values that are not finite, for a method that does not say that it ``updates``
    weights, and for parameters that are split over processes.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"method {method.name!r} returned weights in a {type(given).__name__}, not a dict")
    if given and not method.updates:
        raise ValueError(f"method {method.name!r} returned weights, but was made without updates=True")
    if given and problem.shards is not None:
        raise ValueError(f"method {method.name!r} returned weights, but the model's are split; mask it only")
    checked: Weights = {}
    for name, values in given.items():
        where = f"method {method.name!r} returned weights[{name!r}]"
        if name not in problem.weights:
            raise ValueError(f"{where}: there is no prunable parameter of that name")
        old, mask = problem.weights[name], masks[name]
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            raise TypeError(f"{where}: expected a floating-point tensor, got {_kind(values)}")
        if values.shape != old.shape:
            raise ValueError(f"{where} of shape {tuple(values.shape)}, the parameter has {tuple(old.shape)}")
        merged = values.detach().to(old.device, old.dtype).where(mask.to(old.device), old)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"{where}: some kept values are NaN or beyond {old.dtype}")
        checked[name] = merged
    return checked


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
