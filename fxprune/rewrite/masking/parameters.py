"""Find the modules that hold the parameters of a model, by name, or raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from fxprune.capture.errors import check_module
from fxprune.capture.leaves import is_compiled
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.masking.computed import masks_of_computed
from fxprune.rewrite.masking.masked_module import form_of
from fxprune.rewrite.masking.storage import SUFFIX
from fxprune.rewrite.masking.torch_pruning import masks_of_torch
from fxprune.sharded_types import is_dtensor, is_fsdp_module
from fxprune.sparsity.masks import Masks, validate

Place = tuple[str, nn.Module, str]
"""(path of the module, the module, name of the parameter in it)."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that put a prefix before every name (compile, DDP, averaging)."""
    while True:
        if isinstance(model, (DistributedDataParallel, AveragedModel)):
            model = model.module
        elif is_compiled(model):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def join(path: str, attribute: str) -> str:
    """A dotted name."""
    return f"{path}.{attribute}" if path else attribute


def places(model: nn.Module) -> Iterator[Place]:
    """Every name under which a parameter can be reached, in the order of ``state_dict``; tied ones repeat."""
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield path, module, attribute


def masked_places(model: nn.Module) -> Iterator[Place]:
    """The places whose parameter has a mask."""
    for path, module, attribute in places(model):
        # The table of a scripted module has no ``get``.
        if (attribute + SUFFIX) not in module._buffers:
            continue
        mask = module._buffers[attribute + SUFFIX]
        # A mask of ours that somebody turned into numbers is still one; elsewhere the name may mean another.
        plain = isinstance(module, GraphModule) or type(module) is nn.Module
        if mask is not None and (form_of(module) is not None or (plain and mask.dtype == torch.bool)):
            yield path, module, attribute


def parameter_at(place: Place) -> nn.Parameter:
    """The parameter that lives there."""
    parameter = place[1]._parameters[place[2]]
    assert parameter is not None
    return parameter


def mask_at(place: Place) -> torch.Tensor:
    """The mask that lives beside it."""
    mask = place[1]._buffers[place[2] + SUFFIX]
    assert mask is not None
    return mask


def tied(model: nn.Module) -> dict[int, list[Place]]:
    """``id`` of each parameter -> all its places, one per module object and attribute."""
    found: dict[int, dict[tuple[int, str], Place]] = {}
    for place in places(model):
        found.setdefault(id(parameter_at(place)), {}).setdefault((id(place[1]), place[2]), place)
    return {key: list(value.values()) for key, value in found.items()}


def check(model: nn.Module, masks: Any) -> dict[int, torch.Tensor]:
    """``id`` of each parameter to mask -> its mask; raises if ``masks`` or the model forbid it."""
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}, expected a dict of parameter name -> bool tensor"
        )
    named = {join(path, attribute): (path, module, attribute) for path, module, attribute in places(model)}
    for name in masks:
        if name not in named:
            _explain_missing(model, name)
    ready = {name: place for name, place in named.items() if not is_lazy(parameter_at(place))}
    lazy = [name for name in masks if name in named and name not in ready]
    if lazy:
        raise ValueError(f"masks[{lazy[0]!r}]: the parameter is lazy; run the model once before masking it")
    validate(masks, {name: parameter_at(place).shape for name, place in ready.items()}, whole=False)
    split = any(is_fsdp_module(module) for module in model.modules())
    chosen: dict[int, torch.Tensor] = {}
    first: dict[int, str] = {}
    for name, mask in masks.items():
        key = id(parameter_at(named[name]))
        _check_place(name, named[name], split)
        if key in chosen and not torch.equal(chosen[key], mask.to(chosen[key].device)):
            raise ValueError(
                f"masks[{first[key]!r}] and masks[{name!r}] differ, but the two weights are tied"
            )
        chosen[key] = mask
        first.setdefault(key, name)
    return chosen


def _check_place(name: str, place: Place, split: bool) -> None:
    """Raises where a parameter cannot take a mask (any more). ``split``: by ``fully_shard``, if at all."""
    _, module, attribute = place
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"masks[{name!r}]: a TorchScript module cannot be masked; mask it before scripting")
    masked = attribute + SUFFIX in module._buffers
    if is_dtensor(parameter_at(place)) and not masked and not split:
        raise RuntimeError(
            f"masks[{name!r}]: the parameter is a DTensor, and not of fully_shard; set the masks before it is"
            " distributed"
        )
    if "forward" in module.__dict__ and not isinstance(module, GraphModule):
        raise ValueError(
            f"masks[{name!r}]: forward was replaced on this {type(module).__name__} object, so that a mask"
            " could be bypassed; put it into a subclass instead"
        )


def _explain_missing(model: nn.Module, name: Any) -> None:
    """Raises if the weight is there under the names that re-parametrisations give it."""
    path, _, attribute = str(name).rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return
    if attribute + "_orig" in module._parameters:
        raise ValueError(
            f"masks[{name!r}]: the weight is computed from {attribute}_orig; remove that first with"
            f" torch.nn.utils.prune.remove(module, {attribute!r})"
        )


def read(model: nn.Module, **others: NoReturn) -> Masks:
    """The masks of a model, keyed by parameter name: only of parameters that have one, tied ones once.

    Args:
        model: a graph module or plain module in which masks were set, by fxprune or ``torch.nn.utils.prune``.

    Returns:
        Copies of the masks (bool, ``True`` = kept), in the order of the model's parameters. Where channels
        were pruned, biases, norms and tables have masks too, if the rest would see what they hold.

    >>> layer = nn.Linear(2, 1)
    >>> read(layer)
    {}
    """
    refuse_unknown(read, others, "masks")
    check_module(model)
    found: Masks = {}
    seen: set[int] = set()
    for place in masked_places(unwrap(model)):
        if id(parameter_at(place)) not in seen:
            seen.add(id(parameter_at(place)))
            found[join(place[0], place[2])] = _copied(mask_at(place).detach())
    computed = {name: _copied(mask.detach()) for name, mask in masks_of_computed(unwrap(model)).items()}
    return found | computed | masks_of_torch(unwrap(model))


def _copied(mask: torch.Tensor) -> torch.Tensor:
    """A copy of a mask as bool; a comparison of bits is twenty times slower than a copy."""
    return mask.clone() if mask.dtype == torch.bool else mask != 0
