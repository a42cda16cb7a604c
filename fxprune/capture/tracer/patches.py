"""Catch what PyTorch does not report to a mode, by replacing it for the time of a trace.

Custom autograd functions, scripted functions and autocast regions become nodes; functions that cache
their results are called without the cache, which would keep shapes from the trace for real runs to
stumble over.
"""

from __future__ import annotations

import builtins
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType
from typing import Any

import torch
import torch.utils.checkpoint

from fxprune.capture.errors import TRACE_ERRORS, CaptureError
from fxprune.capture.tracer.call_targets import AutogradCall, ScriptedCall
from fxprune.capture.tracer.reachable import ATOMS, Place, applied_class
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.replacing import replaced
from fxprune.capture.tracer.sample_values import MadeUp, needs_numbers
from fxprune.capture.tracer.transforms import nesting, wrapping
from fxprune.torch_private import (
    DisableTorchFunction,
    exit_autocast,
    nn_functions,
    transform_levels,
    transform_wrappers,
)

__all__ = ["patched_functions"]

CONTAINERS = frozenset({list, tuple, dict, str, set, frozenset, torch.Size})


@contextmanager
def patched_functions(recorder: Recorder, places: Iterable[Place]) -> Iterator[None]:
    """Replace what PyTorch does not report, and the cached, scripted and autograd functions at ``places``."""
    apply = _apply(recorder)
    with ExitStack() as stack:
        stack.enter_context(replaced(builtins, "len", _length(recorder)))
        stack.enter_context(replaced(torch.autograd.Function, "apply", apply))
        stack.enter_context(replaced(torch.autocast, "__enter__", _enter(recorder)))
        stack.enter_context(replaced(torch.autocast, "__exit__", _exit(recorder)))
        for name in ("__enter__", "__exit__"):
            hooks = torch.autograd.graph.saved_tensors_hooks
            stack.enter_context(replaced(hooks, name, _checkpointing(recorder, name)))
        stack.enter_context(replaced(nn_functions, "_parse_to", _parsed(nn_functions._parse_to)))
        for module, name in transform_levels:
            stack.enter_context(replaced(module, name, nesting(recorder, getattr(module, name))))
        for module, name in transform_wrappers:
            stack.enter_context(replaced(module, name, wrapping(recorder, getattr(module, name))))
        for place in places:
            if isinstance(place.function, torch.jit.ScriptFunction):
                home = _home(place.holder)
                if home is not None:
                    stack.enter_context(_replaced_place(place, _scripted(recorder, home, place)))
            elif not isinstance(place.holder, dict | list | type | CellType):
                if hidden := applied_class(place.function):
                    stack.enter_context(replaced(hidden, "forward", _refused_forward(recorder, hidden)))
            elif kind := applied_class(place.function):
                # What was looked up before the trace calls no Python code of its own.
                stack.enter_context(_replaced_place(place, functools.partial(apply.__func__, kind)))
            else:
                stack.enter_context(_replaced_place(place, _without_tensors(place.function)))
        yield


def _home(holder: Any) -> str | None:
    """The Python module whose globals a dict is."""
    name = holder.get("__name__") if isinstance(holder, dict) else None
    return name if isinstance(name, str) and vars(sys.modules.get(name, object)) is holder else None


def _length(recorder: Recorder) -> Callable[[Any], Any]:
    """``len``, which makes a plain number of what ``__len__`` returns: of a tensor it gives a traced one."""
    original, thread = builtins.len, threading.get_ident()

    def length(thing: Any) -> Any:
        if type(thing) in CONTAINERS:  # most calls, which should not become slow
            return original(thing)
        if isinstance(thing, torch.Tensor) and recorder.recording and threading.get_ident() == thread:
            return recorder.length(thing) if thing.dim() else original(thing)
        return original(thing)

    return length


def _apply(recorder: Recorder) -> Any:
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        target = original.__get__(None, cls)
        if not recorder.recording:
            return target(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            recorder.tape.regions.begin(args)
            try:
                return args[0](*args[2:], **kwargs)
            finally:
                recorder.tape.regions.end(args)
        if cls.__module__ == torch.utils.checkpoint.__name__:
            # Older releases keep a region's inputs in a function that computes nothing and has a gradient.
            with recorder.paused(), DisableTorchFunction():
                return target(torch.empty(0, requires_grad=True))
        with recorder.paused(), torch.no_grad():
            out = target(*args, **kwargs)
        with DisableTorchFunction():
            return recorder.tape.record("call_function", AutogradCall(cls), args, kwargs, out)

    return classmethod(apply)


def _refused_forward(recorder: Recorder, kind: type[torch.autograd.Function]) -> Any:
    """The forward of a function whose ``apply`` is kept where it cannot be replaced: a call would lose its
    gradient in the graph.
    """
    forward: Any = kind.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if recorder.recording:
            raise CaptureError(
                f"{kind.__name__}.apply was looked up before it is called, in a partial, a tuple or a "
                f"default argument; call {kind.__name__}.apply itself there"
            )
        return forward(*args, **kwargs)

    return staticmethod(call)


def _scripted(recorder: Recorder, home: str, place: Place) -> Callable[..., Any]:
    function = place.function
    target = ScriptedCall(home, place.key, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        with DisableTorchFunction():
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


def _checkpointing(recorder: Recorder, name: str) -> Callable[..., Any]:
    """``__enter__`` or ``__exit__`` of hooks on saved tensors, of which checkpointing makes one kind."""
    original = vars(torch.autograd.graph.saved_tensors_hooks)[name]

    def call(hooks: Any, *error: Any) -> Any:
        if type(hooks).__module__ != torch.utils.checkpoint.__name__:
            return original(hooks, *error)
        change = recorder.tape.regions.begin if name == "__enter__" else recorder.tape.regions.end
        change(hooks)
        return None

    return call


def _parsed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Read the arguments of ``Module.to``: the device of a tensor is that which the code believes in."""

    def parse(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("tensor")
        if not isinstance(given, torch.Tensor):
            return original(*args, **kwargs)
        _, _, non_blocking, memory_format = original(*args, **kwargs)
        return given.device, given.dtype, non_blocking, memory_format

    return parse


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
            recorder.tape.effect(exit_autocast, (node,))

    return leave


def _without_tensors(function: Any) -> Callable[..., Any]:
    """A stand-in for a cached function that takes from the cache only what holds no tensor."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_literal((args, kwargs)):
            hits = function.cache_info().hits
            result = function(*args, **kwargs)
            if function.cache_info().hits == hits or _is_literal(result):
                return result
        return function.__wrapped__(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(function, name))
    return call


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_literal(item) for item in value)
    if isinstance(value, dict):
        return all(_is_literal(item) for item in value.values())
    return type(value) in ATOMS


@contextmanager
def _replaced_place(place: Place, function: Any) -> Iterator[None]:
    """``function`` stands where a cached or scripted function was found."""
    entry = place.entry
    if isinstance(entry, staticmethod | classmethod):
        function = type(entry)(function)
    elif type(entry) is property:
        function = property(function, entry.fset, entry.fdel)
    holder: Any = place.holder
    write = setattr if isinstance(holder, type | CellType) else operator.setitem
    write(holder, place.key, function)
    try:
        yield
    finally:
        write(holder, place.key, entry)
