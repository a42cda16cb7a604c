"""Gradients of weights that are not there: a masked model and a loss come in, dense gradients go out.

What is pruned is zero in storage too. With all masks open the model computes the same, and its gradients are
those of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from fxprune.rewrite.files.tickets import whole
from fxprune.rewrite.masking.parameters import mask_at, masked_places, unwrap
from fxprune.scoring.distributed import average


@contextmanager
def open_masks(model: nn.Module) -> Iterator[None]:
    """All masks are ones inside; afterwards they and all other buffers are as they were."""
    inside = unwrap(model)
    before = [(buffer, buffer.detach().clone()) for buffer in inside.buffers()]
    for place in list(masked_places(inside)):
        mask_at(place).fill_(True)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def dense_gradients(
    model: nn.Module, names: list[str], loss: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """d loss / d weight for every weight of the named parameters; the mean over all processes that train.

    ``.grad``, buffers and random states are left alone. Raises ``ValueError`` for a loss that is no scalar
    with a gradient, or that does not come from this model.
    """
    parameters = [model.get_parameter(name) for name in names]
    with torch.random.fork_rng(), torch.enable_grad(), open_masks(model):
        value = loss()
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss: it returned {value!r}; expected a tensor of one number with a gradient")
        found = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError("loss: it does not depend on pruner.model; run that model in it, not the original")
    gradients = {
        name: torch.zeros_like(whole(parameter)) if gradient is None else whole(gradient).clone()
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }
    if dist.is_available() and dist.is_initialized():
        average(gradients.values(), dist.group.WORLD)
    return gradients
