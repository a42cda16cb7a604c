"""Keep pruned weights at exactly 0.0 in storage, also in the shard that a process holds of a parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fxprune.sharded_types import is_dtensor
from fxprune.sparsity.sharded import own_part

SUFFIX = "_mask"
"""The mask of the parameter ``weight`` is the buffer ``weight_mask`` of the same module."""


def masked_attributes(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """(attribute, parameter, mask) of every parameter of this module, children excluded, that has a mask."""
    for attribute, parameter in module._parameters.items():
        mask = module._buffers.get(attribute + SUFFIX)
        if parameter is not None and mask is not None:
            yield attribute, parameter, mask


@torch.no_grad()
def zero(tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Set the entries of ``tensor`` that ``mask`` does not keep to zero, in place."""
    tensor, mask = local_part(tensor, mask)
    # Not a multiplication: it would keep a NaN or an infinity that stands where the mask is zero.
    tensor.masked_fill_(mask.to(tensor.device).logical_not(), 0.0)


def clean(module: nn.Module) -> None:
    """Set the pruned weights of one module to zero, unseen by autograd, whose results they do not change."""
    for _, parameter, mask in masked_attributes(module):
        zero(parameter.data, mask)


def local_part(tensor: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what this process holds of a tensor that may be sharded, and its part of the whole mask."""
    if not is_dtensor(tensor):
        return tensor, mask
    return tensor.to_local(), own_part(mask, tensor)
