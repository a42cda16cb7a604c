"""Models that ``fully_shard`` (FSDP2) has split: one comes in, its plain twin or its masked class goes out.

``fully_shard`` gives a module a class of its own on top of the module's, and hooks that gather the parameters
for the time of a forward. Such a module cannot be copied, nor run by itself.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.sharded_types import is_dtensor, is_fsdp_class, is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What fully_shard leaves among a module's attributes, besides its hooks; and code compiled for the module.
_TRACES = ("__composable_api_", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_compiled_call_impl")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of ``model`` are split over processes."""
    return any(is_fsdp_module(module) for module in model.modules()) or any(
        is_dtensor(parameter) for parameter in model.parameters()
    )


def reshard(model: nn.Module) -> None:
    """Puts the split parameters in place: after a forward, those of the root may still be whole."""
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before ``fully_shard``.

    >>> plain_class(nn.Linear).__name__
    'Linear'
    """
    return cls.__bases__[-1] if is_fsdp_class(cls) else cls


def sharded_class(cls: type[nn.Module], owner: nn.Module) -> type[nn.Module]:
    """Return the class that ``fully_shard`` makes of ``cls``, for ``owner``, which it has split."""
    from torch.distributed.fsdp import fully_shard

    mesh = next(p.device_mesh for p in owner.parameters() if is_dtensor(p))
    shell = object.__new__(cls)
    nn.Module.__init__(shell)
    # Without parameters nothing is split; torch.compile looks the class up among those made this way.
    fully_shard(shell, mesh=mesh)
    return type(shell)


def home(parameter: torch.Tensor) -> torch.device:
    """The device on which a parameter is used: that of the mesh where it is split, and perhaps offloaded."""
    if not is_dtensor(parameter) or parameter.device.type == parameter.device_mesh.device_type:
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def plain_twin(model: nn.Module) -> nn.Module:
    """The model as it was before ``fully_shard``, without values: split parameters are on the meta device.

    It shares buffers, and parameters that are not split, with the model. No process talks to another.
    """
    reshard(model)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = _without_values(parameter) if is_dtensor(parameter) else parameter
    modules = list(model.modules())
    for module in modules:
        cls = plain_class(type(module))
        # A graph module writes its code into its class: __new__ makes each a class of its own.
        memo[id(module)] = cls.__new__(cls) if issubclass(cls, GraphModule) else object.__new__(cls)
    for module in modules:
        vars(memo[id(module)]).update(copy.deepcopy(_own_state(module), memo))
        if isinstance(module, GraphModule):
            memo[id(module)].graph = copy.deepcopy(module.graph)
            type(memo[id(module)]).__name__ = plain_class(type(module)).__name__
    twin: nn.Module = memo[id(model)]
    return twin


def _without_values(parameter: DTensor) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _own_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that a copy has too, less those that ``fully_shard`` gave it."""
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith(_TRACES) or (name == "_graph" and isinstance(module, GraphModule)):
            continue
        if name.endswith("_hooks") and isinstance(value, dict):
            value = type(value)((key, hook) for key, hook in value.items() if not _is_torchs(hook))
        state[name] = (
            value.detach().clone() if isinstance(value, torch.Tensor) and not value.is_leaf else value
        )
    return state


def _is_torchs(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
