"""One run of a model under the recorder.

In: a model, its arguments (meta tensors), the mode to trace in and the modules to keep whole. Out: a :class:`Trace`.
The model is left as it was: flags, attributes, random number generators, caches.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import TRACE_ERRORS, CaptureError
from fxprune.capture.leaves import is_leaf
from fxprune.capture.ops import is_pure
from fxprune.capture.recorder import Recorder, Scope
from fxprune.capture.shadows import Shadows

__all__ = ["Trace", "remove_dead_code", "trace"]


@dataclass
class Trace:
    """What one run left: the graph, tensors that belong to no module, where nodes were made, what stayed whole."""

    graph: fx.Graph
    constants: dict[str, Any]
    scope: Scope
    reasons: dict[str, str] = field(default_factory=dict)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    training: bool,
    whole: frozenset[str] = frozenset(),
    shadows: Shadows | None = None,
) -> Trace:
    """Record ``model(*args, **kwargs)``; ``whole`` names modules that are not entered."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(id(module), path)
    recorder = Recorder(
        tensor_names(model), device_of(model, args, kwargs), type(model), shadows or Shadows()
    )
    result = Trace(recorder.graph, recorder.constants, recorder.scope)
    call = _caller(recorder, model, paths, whole, result.reasons)
    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        for module in model.modules():
            module.training = training
        arguments, options = _inputs(recorder, model, args, kwargs)
        stack.enter_context(_patched(nn.Module, "__call__", call))
        stack.enter_context(torch.enable_grad())
        with recorder:
            out = model.forward(*arguments, **options)
        recorder.output(out)
    return result


def tensor_names(model: nn.Module) -> dict[int, str]:
    """The qualified name of every tensor that an attribute of a module holds; the first one if there are several."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), f"{path}.{name}" if path else name)
    return names


def device_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where the traced code believes to run: on the device of the parameters, else of the first input."""
    for tensor in model.parameters():
        return tensor.device
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _caller(
    recorder: Recorder, root: nn.Module, paths: dict[int, str], whole: frozenset[str], reasons: dict[str, str]
) -> Callable[..., Any]:
    """What stands in for ``nn.Module.__call__`` while tracing."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if not recorder.recording or path is None:
            return module.forward(*args, **kwargs)
        if module is not root and (path in whole or is_leaf(module)):
            return recorder.leaf(path, module, args, kwargs)
        mark = recorder.checkpoint()
        try:
            with recorder.inside(path, module):
                return module.forward(*args, **kwargs)
        except TRACE_ERRORS as error:
            recorder.rollback(mark)
            if module is root:
                raise
            try:
                result = recorder.leaf(path, module, args, kwargs)
            except TRACE_ERRORS:
                raise error from None
            reasons[path] = f"{type(error).__name__}: {error}"
            return result

    return call


def _inputs(
    recorder: Recorder, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Placeholders for the arguments of ``forward``: those given and those with a default."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments += [recorder.placeholder(f"{name}_{i}", (), item) for i, item in enumerate(value)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            options |= {key: recorder.placeholder(key, (), item) for key, item in value.items()}
        else:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            made = recorder.placeholder(name, default, value)
            if parameter.kind is parameter.KEYWORD_ONLY:
                options[name] = made
            else:
                arguments.append(made)
    return arguments, options


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Whatever tracing does to attributes, flags and random number generators is undone."""
    saved = [(vars(module), dict(vars(module)), _copies(vars(module))) for module in model.modules()]
    state, numbers = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        for attributes, before, copies in saved:
            if attributes != before:
                attributes.clear()
                attributes.update(before)
            for container, copy in copies:
                if isinstance(container, list):
                    container[:] = copy
                else:
                    container.clear()
                    container.update(copy)
        torch.set_rng_state(state)
        random.setstate(numbers)


def _copies(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [
        (value, value.copy())
        for value in attributes.values()
        if isinstance(value, list | dict | set) and value
    ]


def remove_dead_code(graph: fx.Graph) -> None:
    """Drop the nodes that nobody reads and that do nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
