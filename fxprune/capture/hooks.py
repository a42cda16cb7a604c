"""Tell the hooks that are part of the traced code from those that stay with their module.

Forward hooks and pre-hooks run while a model is traced, as its other code does. Hooks of PyTorch's own (the
old ``weight_norm`` and ``spectral_norm``, ``torch.nn.utils.prune``) and backward hooks stay with their
module, which is one node of the graph. So do, on modules that the graph calls, hooks that change nothing.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from fxprune.torch_private import global_forward_hooks, global_forward_pre_hooks

__all__ = [
    "BACKWARD_TABLES",
    "FORWARD_TABLES",
    "GLOBAL_TABLES",
    "KINDS",
    "Hook",
    "hook_name",
    "is_of_pytorch",
    "keeps_hooks",
    "similar_hooks",
    "traced_hooks",
    "without_hooks",
]

Hook = tuple[int, int]
"""The id of a module, and the number under which it holds the hook."""

KINDS = ("_forward_pre_hooks", "_forward_hooks")
FORWARD_TABLES = (*KINDS, *(f"{kind}_with_kwargs" for kind in KINDS), "_forward_hooks_always_called")
BACKWARD_TABLES = ("_backward_hooks", "_backward_pre_hooks")
GLOBAL_TABLES = {
    "_forward_pre_hooks": global_forward_pre_hooks,
    "_forward_hooks": global_forward_hooks,
}
"""The hooks of all modules, by the name of a module's own table."""


def is_of_pytorch(hook: Any) -> bool:
    """Whether PyTorch defines a hook, or derives it from what changes weights in ``torch.nn.utils``."""
    hook = _function(hook)
    if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__):
        return True
    return str(getattr(hook, "__module__", "")).startswith("torch.") and not isinstance(hook, nn.Module)


def hook_name(hook: Any) -> str:
    """Name the function of a hook, or its class."""
    hook = _function(hook)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def keeps_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks, or forward hooks of PyTorch's own: those are not traced."""
    if any(getattr(module, table, None) for table in BACKWARD_TABLES):
        return True
    return any(is_of_pytorch(hook) for kind in KINDS for hook in getattr(module, kind, {}).values())


def traced_hooks(module: nn.Module) -> Iterator[tuple[Hook, Any]]:
    """The forward hooks and pre-hooks of a module that are run while it is traced."""
    for kind in KINDS:
        for key, hook in getattr(module, kind, {}).items():
            if not is_of_pytorch(hook):
                yield (id(module), key), hook


def similar_hooks(model: nn.Module) -> list[dict[Hook, nn.Module]]:
    """Group the traced hooks of a model by their code; each with its module."""
    groups: dict[Any, dict[Hook, nn.Module]] = {}
    for module in model.modules():
        for key, hook in traced_hooks(module):
            function = _function(hook)
            code = getattr(getattr(function, "__func__", function), "__code__", type(function))
            groups.setdefault(code, {})[key] = module
    return list(groups.values())


def without_hooks(module: nn.Module, hooks: Collection[Hook]) -> nn.Module:
    """A module without some of its hooks, which shares everything else with ``module``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(print)
        >>> other = without_hooks(layer, [(id(layer), handle.id)])
        >>> len(layer._forward_hooks), len(other._forward_hooks), other.weight is layer.weight
        (1, 0, True)
    """
    made: nn.Module = object.__new__(type(module))
    vars(made).update(vars(module))
    for table in FORWARD_TABLES:
        known = vars(module).get(table)
        if known:
            kept = ((key, value) for key, value in known.items() if (id(module), key) not in hooks)
            vars(made)[table] = OrderedDict(kept)
    return made


def _function(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
