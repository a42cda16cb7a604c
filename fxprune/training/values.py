"""Weights to come back to: a model comes in, copies of its parameters and buffers go out; and back again."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.rewrite.files.tickets import centroids, negative_signs, neutralise, set_centroids, whole
from fxprune.rewrite.masking.computed import computed_weights, mask_of_computed
from fxprune.rewrite.masking.parameters import mask_at, masked_places, parameter_at, unwrap
from fxprune.rewrite.masking.storage import zero
from fxprune.sharded_types import is_dtensor

Values = dict[str, torch.Tensor]
"""Name of a parameter or buffer -> its value, on the host. Masks are not among them."""


def values_of(model: nn.Module) -> Values:
    """Copies of all parameters and buffers of a model except its masks, on the host."""
    inside = unwrap(model)
    found = {name: whole(parameter).to("cpu", copy=True) for name, parameter in inside.named_parameters()}
    masks = {id(mask_at(place)) for place in masked_places(inside)}
    masks |= {id(mask_of_computed(*place)) for place in computed_weights(inside).values()}
    found |= {
        name: buffer.detach().to("cpu", copy=True)
        for name, buffer in inside.named_buffers()
        if id(buffer) not in masks
    }
    return found


@torch.no_grad()
def put_back(model: nn.Module, values: Values) -> None:
    """Sets parameters and buffers to ``values``, in place; what the masks of now prune is zero."""
    inside = unwrap(model)
    for name, tensor in [*inside.named_parameters(), *inside.named_buffers()]:
        if name not in values:
            continue
        value = values[name].to(tensor.device)
        if is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor

            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(value)
    for place in masked_places(inside):
        zero(parameter_at(place), mask_at(place))


def to_centroids(model: nn.Module) -> None:
    """Sets every masked weight to the mean of its layer's weights of its sign, biases to 0, norms to 1.

    Raises ``ValueError`` for a masked weight that is computed from other parameters.
    """
    set_centroids(model, centroids(model), negative_signs(model))
    neutralise(model)
