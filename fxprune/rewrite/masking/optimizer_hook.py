"""Pruned weights stay exactly 0.0 in storage, whatever an optimiser does: the masked modules that are alive.

The forward of a masked module stops gradients, but momentum, Adam's averages or decoupled updates from a time
before the masks would still move a pruned weight. One hook on all optimisers, registered when the first
masked module comes to life, sets the masked entries of the parameters that an optimiser owns back to zero
after its step.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxprune.sharded_types import is_dtensor
from fxprune.sparsity.sharded import own_part

_living: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[torch.utils.hooks.RemovableHandle] = []
_cleaned: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


def enrol(module: nn.Module) -> None:
    """From now on the module's masked parameters are looked after, as long as the module lives."""
    _living.add(module)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def release(module: nn.Module) -> None:
    """The module is no longer looked after."""
    _living.discard(module)


@torch.no_grad()
def zero(tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Sets the entries of ``tensor`` that ``mask`` does not keep to zero, in place; also in a shard."""
    tensor, mask = local_part(tensor, mask)
    # Not a multiplication: it would keep a NaN or an infinity that stands where the mask is zero.
    tensor.masked_fill_(mask.to(tensor.device).logical_not(), 0.0)


def local_part(tensor: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What this process holds of a tensor that may be sharded, and its part of the (replicated) mask."""
    if not is_dtensor(tensor):
        return tensor, mask
    return tensor.to_local(), own_part(mask, tensor)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in list(_living):
        for attribute, parameter in module._parameters.items():
            mask = module._buffers.get(attribute + "_mask")
            if mask is not None and parameter is not None and id(parameter) in owned:
                zero(parameter, mask)
                _clean_state(optimizer, parameter, mask)


def _clean_state(optimizer: Optimizer, parameter: nn.Parameter, mask: torch.Tensor) -> None:
    """Zeroes momentum and averages of pruned entries, once for each change of the mask.

    Afterwards they stay zero by themselves, for the gradient there is zero.
    """
    cleaned = _cleaned.setdefault(optimizer, {})
    version = (id(mask), -1 if mask.is_inference() else mask._version)
    if cleaned.get(id(parameter)) == version:
        return
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            zero(value, mask)
    cleaned[id(parameter)] = version
