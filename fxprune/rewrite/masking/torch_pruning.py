"""Take over what ``torch.nn.utils.prune`` has done: its masks come out, its hooks go.

It keeps ``weight_orig`` and ``weight_mask``, and computes ``weight`` before every forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from fxprune.rewrite.masking.storage import SUFFIX, zero

__all__ = ["masks_of_torch", "take_over"]

ORIGINAL = "_orig"


def masks_of_torch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the masks that ``torch.nn.utils.prune`` has set, by the names that the parameters had before."""
    return {
        f"{path}.{name}" if path else name: module._buffers[name + SUFFIX] != 0  # type: ignore[misc]
        for path, module, name in _places(model)
    }


def take_over(model: nn.Module) -> None:
    """Give the parameters their names back, with zeros in them, in place; tensors are not written to."""
    for _, module, name in list(_places(model)):
        original = module._parameters[name + ORIGINAL]
        mask = module._buffers[name + SUFFIX]
        assert original is not None
        assert mask is not None
        parameter = nn.Parameter(original.detach().clone(), original.requires_grad)
        zero(parameter.data, mask != 0)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                del module._forward_pre_hooks[key]
        # In its old place: the order of parameters is that of the original.
        parameters = list(module._parameters.items())
        module._parameters = dict(
            (name, parameter) if value is original else (key, value) for key, value in parameters
        )
        del module._buffers[name + SUFFIX]
        vars(module).pop(name, None)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                yield path, module, hook._tensor_name
