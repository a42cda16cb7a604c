"""What PyTorch does not report to a mode, caught by replacing it for the time of a trace.

Custom autograd functions, scripted functions and autocast regions become nodes; functions that cache
their results are called without the cache, which would keep shapes from the trace for real runs to
stumble over.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.amp.autocast_mode import _exit_autocast

from fxprune.capture.errors import TRACE_ERRORS
from fxprune.capture.tracer.call_targets import AutogradCall, ScriptedCall
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.sample_values import MadeUp, needs_numbers

__all__ = ["patched_functions", "replaced"]

FOREIGN = frozenset(("torch", "builtins", "numpy", "typing", "fxprune", "functools", "collections", "math"))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def patched_functions(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Everything in this file, for the code of ``model``."""
    with ExitStack() as stack:
        stack.enter_context(replaced(torch.autograd.Function, "apply", _apply(recorder)))
        stack.enter_context(replaced(torch.autocast, "__enter__", _enter(recorder)))
        stack.enter_context(replaced(torch.autocast, "__exit__", _exit(recorder)))
        for owner, name, value in _special(model):
            if isinstance(value, torch.jit.ScriptFunction):
                stack.enter_context(replaced(owner, name, _scripted(recorder, owner, name, value)))
            else:
                stack.enter_context(replaced(owner, name, value.__wrapped__))
        yield


def _apply(recorder: Recorder) -> Any:
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        target = original.__get__(None, cls)
        if not recorder.recording:
            return target(*args, **kwargs)
        with recorder.paused(), torch.no_grad():
            out = target(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return recorder.tape.record("call_function", AutogradCall(cls), args, kwargs, out)

    return classmethod(apply)


def _scripted(recorder: Recorder, owner: Any, name: str, function: Any) -> Callable[..., Any]:
    target = ScriptedCall(owner.__name__, name, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            try:
                out = recorder.tape.shadows.run(function, args, kwargs)
            except TRACE_ERRORS as error:
                if not needs_numbers(error):
                    raise
                out = MadeUp().run(function, args, kwargs)
            return (
                recorder.tape.record("call_function", target, args, kwargs, out)
                if recorder.recording
                else out
            )

    return call


def _enter(recorder: Recorder) -> Callable[[Any], Any]:
    def enter(region: Any) -> Any:
        if recorder.recording:
            options = (region.fast_dtype, region._enabled, region._cache_enabled)
            region.fxprune_node = recorder.enter_autocast(region.device, *options)
        return region

    return enter


def _exit(recorder: Recorder) -> Callable[..., Any]:
    def leave(region: Any, *error: Any) -> None:
        node = vars(region).pop("fxprune_node", None)
        if node is not None:
            recorder.tape.effect(_exit_autocast, (node,))

    return leave


def _special(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Cached and scripted functions that the model's code can reach by name."""
    kinds = (functools._lru_cache_wrapper, torch.jit.ScriptFunction)
    classes = {base for module in model.modules() for base in type(module).__mro__ if _ours(base.__module__)}
    found: list[tuple[Any, str, Any]] = [
        (owner, n, v) for owner in classes for n, v in vars(owner).items() if isinstance(v, kinds)
    ]
    seen: dict[str, ModuleType] = {}
    pending = [owner.__module__ for owner in classes]
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        if name in seen or module is None or not _ours(name):
            continue
        seen[name] = module
        for key, value in list(vars(module).items()):
            if isinstance(value, kinds):
                found.append((module, key, value))
            elif isinstance(value, FunctionType):
                pending.append(value.__module__)
    return found


def _ours(module: str) -> bool:
    return module.split(".")[0] not in FOREIGN
