"""Read everything that a network holds, tied tensors once, and set it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.rewrite.masking.parameters import join, masked_places
from fxprune.rewrite.masking.storage import SUFFIX

__all__ = ["Held", "assign", "cast", "check_fit", "held", "tied_names", "transient_types"]


@dataclass(frozen=True)
class Held:
    """One name under which a module holds a parameter or a buffer that belongs to the state dict."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: Tensor


def held(network: nn.Module) -> Iterator[Held]:
    """Yield all of a state dict but masks; tied tensors under each of their names."""
    masks = {(id(owner), leaf + SUFFIX) for _, owner, leaf in masked_places(network)}
    for path, module in network.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"network: {path or type(module).__name__} has extra state, which is no tensor")
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Held(join(path, leaf), module, leaf, parameter)
        for leaf, buffer in module._buffers.items():
            left_out = leaf in module._non_persistent_buffers_set or (id(module), leaf) in masks
            if buffer is not None and not left_out:
                yield Held(join(path, leaf), module, leaf, buffer)


def tied_names(network: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same tensor, for all names but the first."""
    first: dict[int, str] = {}
    return {
        one.name: first[id(one.tensor)]
        for one in held(network)
        if first.setdefault(id(one.tensor), one.name) != one.name
    }


def transient_types(network: nn.Module) -> dict[str, str]:
    """The types of buffers with real numbers that are not in the state dict, by name."""
    found = {}
    for path, module in network.named_modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.is_floating_point():
                found[join(path, leaf)] = str(buffer.dtype).removeprefix("torch.")
    return found


def check_fit(network: nn.Module, values: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """``ValueError`` unless ``values`` fit, with the name of the first tensor that does not."""
    found = {one.name: one.tensor for one in held(network)}
    for name, tensor in found.items():
        value = values.get(tied.get(name, name))
        if value is None:
            raise ValueError(f"model: it has {name!r}, which the saved network has not; it is another one")
        if value.shape != tensor.shape:
            raise ValueError(
                f"model: {name!r} has shape {tuple(tensor.shape)}, the saved network {tuple(value.shape)};"
                " build the model as it was"
            )
    missing = next((name for name in values if name not in found), None)
    if missing is not None:
        raise ValueError(f"model: it has no {missing!r}, which the saved network has; it is another one")


@torch.no_grad()
def assign(network: nn.Module, values: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Give a network the values of a file, in place; tensors on the meta device become real."""
    new: dict[int, Tensor] = {}
    for one in list(held(network)):
        tensor = one.tensor
        if id(tensor) not in new:
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            value = values[tied.get(one.name, one.name)].to(device, copy=True)
            if tensor.is_meta:
                real = (
                    nn.Parameter(value, tensor.requires_grad) if one.leaf in one.owner._parameters else value
                )
                new[id(tensor)] = real
            else:
                tensor.data = value
                new[id(tensor)] = tensor
        if new[id(tensor)] is not tensor:
            table = one.owner._parameters if one.leaf in one.owner._parameters else one.owner._buffers
            table[one.leaf] = new[id(tensor)]  # type: ignore[assignment]
    hollow = next((name for name, buffer in network.named_buffers() if buffer.is_meta), None)
    if hollow is not None:
        raise ValueError(f"model: the buffer {hollow!r} has no values and is in no file; build it on the CPU")


@torch.no_grad()
def cast(
    network: nn.Module, values: Mapping[str, Tensor], tied: Mapping[str, str], transient: Mapping[str, str]
) -> None:
    """Give the tensors of a network the types that they have in a file, in place."""
    for one in held(network):
        value = values.get(tied.get(one.name, one.name))
        if value is not None and value.dtype != one.tensor.dtype:
            one.tensor.data = one.tensor.data.to(value.dtype)
    buffers = dict(network.named_buffers())
    for name, kind in transient.items():
        dtype = getattr(torch, kind)
        if name in buffers and buffers[name].dtype != dtype:
            buffers[name].data = buffers[name].data.to(dtype)
