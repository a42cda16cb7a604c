"""Tickets: a sparse network as mask bits, signs and two numbers per layer; out of a model, and back into one.

The signed means of a layer's weights, its centroids, stand for all of them (ASNI: Damadi, Nouri, Pirsiavash,
algorithm 1, lines 12 to 18). A ticket file is a mask file with them, and with one more bit for each weight
that is kept: whether it starts from the one or from the other.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fxprune.rewrite.files.packing import pack, unpack
from fxprune.rewrite.masking.computed import masks_of_computed
from fxprune.rewrite.masking.parameters import join, mask_at, masked_places, parameter_at, unwrap
from fxprune.rewrite.masking.storage import zero
from fxprune.sharded_types import is_dtensor
from fxprune.torch_private import NormBase

CENTROIDS, SIGNS = "//centroids", "//signs"
"""Names in a file that no parameter can have."""


def centroids(model: nn.Module) -> dict[str, tuple[float, float]]:
    """The mean of the negative and the mean of the positive weights of every masked parameter.

    Means are taken in double precision and rounded to single. Where there is no weight of a sign, its mean is
    0.0. Sharded parameters are gathered one at a time.

    Returns:
        Parameter name -> (negative, positive); tied ones once.

    Raises:
        ValueError: a masked weight is computed from other parameters, and cannot be set to a centroid.

    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(5, 1)
    >>> layer.weight.data = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 3.0]])
    >>> install(layer, {"weight": torch.tensor([[True, True, False, True, True]])})
    >>> centroids(layer)
    {'weight': (-1.5, 2.0)}
    """
    computed = next(iter(masks_of_computed(unwrap(model))), None)
    if computed is not None:
        raise ValueError(
            f"model: its weight {computed!r} is computed by a parametrization, and cannot start from"
            " centroids; save with form='masks', or remove the parametrization before pruning"
        )
    return {name: _means(kept_values(parameter, mask)) for name, parameter, mask in masked_parameters(model)}


def masked_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, torch.Tensor]]:
    """(name, parameter, mask) of every masked parameter, tied ones once."""
    found, seen = [], set()
    for place in masked_places(unwrap(model)):
        parameter = parameter_at(place)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found.append((join(place[0], place[2]), parameter, mask_at(place)))
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, gathered where it is sharded."""
    detached = tensor.detach()
    return detached.full_tensor() if is_dtensor(detached) else detached


def kept_values(parameter: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a parameter's values times its mask, gathered where it is sharded."""
    values = whole(parameter)
    return values.masked_fill(mask.to(values.device).logical_not(), 0.0)


def _means(weight: torch.Tensor) -> tuple[float, float]:
    wide = weight.double()
    ends = []
    for side in (wide < 0, wide > 0):
        number = side.sum().clamp(min=1)
        ends.append((wide * side).sum() / number)
    negative, positive = torch.stack(ends).float().tolist()
    return negative, positive


@torch.no_grad()
def set_centroids(
    model: nn.Module, values: dict[str, tuple[float, float]], signs: dict[str, torch.Tensor]
) -> None:
    """Sets every masked weight to a centroid, in place, the negative one where ``signs`` is True."""
    for name, parameter, mask in masked_parameters(model):
        negative, positive = values[name]
        sides = torch.where(signs[name].to(mask.device), negative, positive).to(parameter.dtype)
        if is_dtensor(parameter):
            from torch.distributed.tensor import DTensor

            placed = DTensor.from_local(sides, parameter.device_mesh, run_check=False)
            sides = placed.redistribute(parameter.device_mesh, parameter.placements)
        parameter.copy_(sides)
        zero(parameter, mask)


def negative_signs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Mark the weights of masked parameters that are below zero; a kept weight of zero is not."""
    return {name: kept_values(parameter, mask) < 0 for name, parameter, mask in masked_parameters(model)}


def ticket_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a ticket besides masks: centroids, (L, 2), and signs of all kept weights."""
    values, signs = centroids(model), negative_signs(model)
    kept_signs = [signs[name].cpu()[mask.cpu()] for name, _, mask in masked_parameters(model)]
    return {CENTROIDS: torch.tensor(list(values.values())), SIGNS: pack(torch.cat(kept_signs))}


def unpack_ticket(
    masks: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, tuple[float, float]], dict[str, torch.Tensor]]:
    """Centroids and signs by parameter name, of the tensors in a ticket file; ``ValueError`` if damaged."""
    try:
        table = tensors[CENTROIDS]
        if table.shape != (len(masks), 2):
            raise ValueError(f"centroids of shape {tuple(table.shape)} for {len(masks)} layers")
        numbers = [int(mask.sum()) for mask in masks.values()]
        parts = torch.split(unpack(tensors[SIGNS], torch.Size([sum(numbers)])), numbers)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged ticket ({error})") from error
    rows: list[Any] = table.tolist()
    values = {name: (row[0], row[1]) for name, row in zip(masks, rows, strict=True)}
    signs = {}
    for (name, mask), part in zip(masks.items(), parts, strict=True):
        signs[name] = torch.zeros_like(mask)
        signs[name][mask] = part
    return values, signs


@torch.no_grad()
def neutralise(model: nn.Module) -> None:
    """Biases 0, weights of norms 1, running statistics as if nothing had been seen; in place.

    What is neither masked nor a bias nor a vector called ``weight`` (embeddings, tokens, layers that are not
    pruned, PReLU's slopes) keeps its value.
    """
    for module in unwrap(model).modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or attribute + "_mask" in module._buffers:
                continue
            if attribute in ("bias", "in_proj_bias"):
                parameter.zero_()
            elif attribute == "weight" and parameter.dim() == 1 and not isinstance(module, nn.PReLU):
                parameter.fill_(1.0)
        if isinstance(module, NormBase):
            module.reset_running_stats()
