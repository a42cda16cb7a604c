"""Weights that a module computes from other parameters: ``parametrize``, and torch's older hooks.

The computed weight is what data meets, so it is what is scored and masked, under its own name. The mask
stands behind the computation: as the last parametrization, or as a hook after the one that computes.
Parameters that the weight is computed from are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.rewrite.masking.averages import identify, note, watch
from fxprune.rewrite.masking.copying import duplicate
from fxprune.rewrite.masking.masked_module import form_of, masked_class, original_class
from fxprune.rewrite.masking.optimizer_hook import enrol
from fxprune.rewrite.masking.storage import SUFFIX

Model = TypeVar("Model", bound=nn.Module)
Computed = tuple[nn.Module, str]
"""(the module, the name of the weight in it)."""


def _set_state(self: nn.Module, state: dict[str, Any]) -> None:
    nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
    enrol(self)
    watch(self)


class WeightMask(nn.Module):
    """The last step of a computed weight: zeros where the mask has them.

    ``masked_sources``: the parameters that the weight is computed from. They belong to another module, and
    tell of a copy whether it is an average.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, sources: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.masked_sources = list(sources)
        identify(self)
        enrol(self)

    __setstate__ = _set_state

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an assigned weight as it is; it is masked when it is read."""
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "mask", self.mask)  # a dense checkpoint: the model keeps its mask
        super()._load_from_state_dict(state_dict, prefix, *rest)
        note(self)


class HookedMask(nn.Module):
    """The mask of a weight that an older hook computes, as averages know it; no part of its module.

    ``owner`` is the module, in a tuple, which registers nothing.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = (module,), name
        identify(self)
        enrol(self)

    __setstate__ = _set_state

    @property
    def mask(self) -> Tensor | None:
        """None while a copy of the module is being made."""
        found: Tensor | None = vars(self.owner[0]).get("_buffers", {}).get(self.name + SUFFIX)
        return found

    @property
    def masked_sources(self) -> list[nn.Parameter]:
        return computed_from(self.owner[0], self.name) if self.mask is not None else []


class MaskHook:
    """Multiply a weight that an earlier hook has computed, before the module runs."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.hooked = name, HookedMask(module, name)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        setattr(module, self.name, getattr(module, self.name) * module._buffers[self.name + SUFFIX])

    def loaded(self, module: nn.Module, keys: Any) -> None:
        """Take what was loaded into the module as seen."""
        note(self.hooked)


def computed_weights(model: nn.Module) -> dict[str, Computed]:
    """The computed weights of a model that are matrices, by name.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> list(computed_weights(nn.Sequential(layer)))
    ['0.weight']
    """
    found: dict[str, Computed] = {}
    for path, module in model.named_modules():
        for name in _names(module):
            weight = value_of(module, name)
            if weight.dim() > 1 and weight.is_floating_point():
                found[f"{path}.{name}" if path else name] = (module, name)
    return found


def _names(module: nn.Module) -> Iterator[str]:
    if parametrize.is_parametrized(module):
        steps: Any = module.parametrizations
        yield from (name for name in steps if isinstance(getattr(type(module), name, None), property))
    for hook in module._forward_pre_hooks.values():
        name = str(getattr(hook, "name", ""))
        known = {f"{name}_v", f"{name}_orig"} & module._parameters.keys()
        if known and not isinstance(hook, MaskHook) and isinstance(module.__dict__.get(name), Tensor):
            yield name


def value_of(module: nn.Module, name: str) -> Tensor:
    """The computed weight as it is now; a spectral norm takes no step for it."""
    if not parametrize.is_parametrized(module, name):
        value: Tensor = module.__dict__[name]
        return value.detach()
    steps: Any = module.parametrizations[name]  # type: ignore[index]
    modes = {step: step.training for step in steps.modules()}
    steps.eval()
    try:
        with torch.no_grad():
            value = getattr(module, name)
    finally:
        for step, training in modes.items():
            step.training = training
    return value.detach()


def computed_from(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a computed weight is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    parts = (module._parameters.get(name + end) for end in ("_g", "_v", "_orig"))
    return [part for part in parts if part is not None]


def present_weight(model: nn.Module, name: str) -> Tensor:
    """The parameter called ``name``, or the computed weight of that name as it is now."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    own = module._parameters.get(attribute)
    return value_of(module, attribute) if own is None else own


def mask_of_computed(module: nn.Module, name: str) -> Tensor | None:
    """The mask of a computed weight, if it has one."""
    if parametrize.is_parametrized(module, name):
        last = list(module.parametrizations[name])[-1]  # type: ignore[index]
        return last.mask if isinstance(last, WeightMask) else None
    hooked = any(isinstance(hook, MaskHook) and hook.name == name for hook in _hooks(module))
    return module._buffers.get(name + SUFFIX) if hooked else None


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def put_computed(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask a computed weight, or change its mask in place."""
    present = mask_of_computed(module, name)
    if present is not None:
        present.copy_(mask)
        if parametrize.is_parametrized(module, name):
            note(list(module.parametrizations[name])[-1])  # type: ignore[index]
        for hook in _hooks(module):
            if isinstance(hook, MaskHook) and hook.name == name:
                note(hook.hooked)
        return
    own = mask.detach().to(value_of(module, name).device, copy=True)
    if parametrize.is_parametrized(module, name):
        last = WeightMask(own, computed_from(module, name))
        module.parametrizations[name].append(last)  # type: ignore[index,union-attr]
        return
    module.register_buffer(name + SUFFIX, own)
    hook = MaskHook(module, name)
    module.register_forward_pre_hook(hook)
    module.register_load_state_dict_post_hook(hook.loaded)  # type: ignore[no-untyped-call]
    setattr(module, name, value_of(module, name) * own)


def masks_of_computed(model: nn.Module) -> dict[str, Tensor]:
    """The masks of all computed weights that have one, by name."""
    found = {name: mask_of_computed(*place) for name, place in computed_weights(model).items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def check_computed(masks: Mapping[str, Tensor], places: Mapping[str, Computed]) -> None:
    """Raise for masks of computed weights that do not fit them."""
    for name in masks.keys() & places.keys():
        module, attribute = places[name]
        mask, shape = masks[name], tuple(value_of(module, attribute).shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"masks[{name!r}]: expected a bool tensor (True = kept), got {mask!r:.60}")
        if tuple(mask.shape) != shape:
            raise ValueError(f"masks[{name!r}] has shape {tuple(mask.shape)}, the weight has {shape}")


def unmask_computed(model: nn.Module) -> None:
    """Take the masks of computed weights out again, in place."""
    for module, attribute in computed_weights(model).values():
        if mask_of_computed(module, attribute) is None:
            continue
        if parametrize.is_parametrized(module, attribute):
            module.parametrizations[attribute].pop(-1)  # type: ignore[index,union-attr]
            continue
        module._buffers.pop(attribute + SUFFIX)
        _drop_hooks(module, attribute)


def _drop_hooks(module: nn.Module, name: str) -> None:
    """Take out the hooks that mask a weight."""
    for table in (module._forward_pre_hooks, module._load_state_dict_post_hooks):
        for key, hook in list(table.items()):
            own = getattr(hook, "__self__", hook)
            if isinstance(own, MaskHook) and own.name == name:
                del table[key]


def settle(module: nn.Module, name: str) -> None:
    """Make a computed weight a plain parameter of its present value, in place."""
    training = module.training
    module.eval()  # a spectral norm takes a step in training
    try:
        with torch.no_grad():
            if parametrize.is_parametrized(module, name):
                _settle_parametrized(module, name)
            else:
                _settle_hooked(module, name)
    finally:
        module.train(training)


def _settle_parametrized(module: nn.Module, name: str) -> None:
    # torch's own removal changes the class, which copies of the module share.
    value = value_of(module, name).clone()
    steps: Any = module.parametrizations
    learns = any(parameter.requires_grad for parameter in steps[name].parameters())
    base, form = original_class(module), form_of(module)
    if len(steps) > 1:
        left_out = (name, "__dict__", "__weakref__")
        rest = {key: found for key, found in vars(base).items() if key not in left_out}
        plain: type[nn.Module] = type(base.__name__, base.__bases__, rest)
    else:
        plain = base.__bases__[0]
    module.__class__ = plain if form is None else masked_class(plain, form)
    del steps[name]
    if not len(steps):
        del module.parametrizations
    module.register_parameter(name, nn.Parameter(value, requires_grad=learns))


def _settle_hooked(module: nn.Module, name: str) -> None:
    hooks = [hook for hook in _hooks(module) if getattr(hook, "name", None) == name]
    for hook in hooks:
        hook(module, None)
    value = getattr(module, name).detach().clone()
    _drop_hooks(module, name)
    for table in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(table.items()):
            inner = getattr(hook, "hook", hook)
            if hook in hooks or getattr(getattr(inner, "fn", None), "name", None) == name:
                del table[key]
    for part in ("_g", "_v", "_orig"):
        module._parameters.pop(name + part, None)
    for part in ("_u", "_v", SUFFIX):
        module._buffers.pop(name + part, None)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(value))


def settled(model: Model) -> Model:
    """The model itself if it computes no weight, else a copy in which those weights are plain parameters.

    The copy shares with the model all parameters and buffers that have nothing to do with those weights.

    >>> model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> [name for name, _ in settled(model).named_parameters()]
    ['bias', 'weight']
    """
    if not computed_weights(model):
        return model
    twin = duplicate(model, [*model.parameters(), *model.buffers()])
    for module, name in computed_weights(twin).values():
        settle(module, name)
    return twin
