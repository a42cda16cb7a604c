"""Keep pruned weights at zero whatever an optimiser does, by one hook on all optimisers.

The forward of a masked module stops gradients, but momentum, Adam's averages or decoupled updates from a time
before the masks would still move a pruned weight. After each step the hook zeroes the masked entries of the
parameters that the optimiser owns, and looks at the copies of their modules (:mod:`.averages`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxprune.rewrite.masking.averages import forget, mask_averages
from fxprune.rewrite.masking.storage import masked_attributes, zero

_living: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[torch.utils.hooks.RemovableHandle] = []
_cleaned: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


def enrol(module: nn.Module) -> None:
    """Look after the masked parameters of a module from now on, as long as it lives."""
    _living.add(module)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def release(module: nn.Module) -> None:
    """Look after a module no longer."""
    _living.discard(module)
    forget(module)


def living() -> list[nn.Module]:
    """The masked modules that are alive."""
    return list(_living)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = []
    for module in living():
        for _, parameter, mask in masked_attributes(module):
            if id(parameter) in owned:
                zero(parameter, mask)
                _clean_state(optimizer, parameter, mask)
                trained.append(module)
        if any(id(source) in owned for source in getattr(module, "masked_sources", ())):
            trained.append(module)
    for module in trained:
        forget(module)
    mask_averages(trained)


def _clean_state(optimizer: Optimizer, parameter: nn.Parameter, mask: torch.Tensor) -> None:
    """Zero momentum and averages of pruned entries, once for each change of the mask.

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
