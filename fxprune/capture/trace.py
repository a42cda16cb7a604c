"""One run of a model under the recorder.

In: a model, its arguments (meta tensors), the mode to trace in and the modules to keep whole. Out: a
:class:`Trace`. The model is left as it was.
"""

from __future__ import annotations

import inspect
import itertools
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import TRACE_ERRORS, first_line
from fxprune.capture.leaves import is_leaf
from fxprune.capture.ops import is_pure
from fxprune.capture.patches import patched_functions, replaced
from fxprune.capture.recorder import Recorder
from fxprune.capture.shadows import Shadows
from fxprune.capture.state import untouched
from fxprune.capture.tape import Scope, Tape

__all__ = ["Trace", "remove_dead_code", "shapes_only", "trace", "where"]

LIBRARY = str(Path(torch.__file__).parent) + os.sep
PACKAGE = str(Path(__file__).parent) + os.sep


@dataclass
class Trace:
    """What one run left behind.

    ``constants`` are tensors that belong to no module, ``scope`` says which module call made which node,
    ``reasons`` why a module had to stay whole, ``changed`` which entered modules wrote which attribute
    of themselves.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    scope: Scope
    reasons: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


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
    recorder = _recorder(model, shadows)
    tape = recorder.tape
    result = Trace(tape.graph, tape.constants, tape.scope)
    changed: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(untouched(model, changed, tape.shadows.written))
        _set_training(model, training)
        arguments, options = _inputs(tape, model, args, kwargs)
        stack.enter_context(replaced(nn.Module, "__call__", _caller(recorder, model, whole, result.reasons)))
        stack.enter_context(patched_functions(recorder, model))
        stack.enter_context(torch.enable_grad())
        with recorder:
            out = model.forward(*arguments, **options)
        tape.output(out)
    leaves = {str(node.target) for node in tape.graph.nodes if node.op == "call_module"}
    for path, name in changed.items():
        atoms = path.split(".")
        if not any(".".join(atoms[:i]) in leaves for i in range(1, len(atoms) + 1)):
            result.changed[path] = name
    return result


def shapes_only(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Evaluate the model in shapes, unrecorded: raises what it says itself to these inputs."""
    recorder = _recorder(model, None)
    with ExitStack() as stack:
        stack.enter_context(untouched(model, {}))
        _set_training(model, False)
        stack.enter_context(replaced(nn.Module, "__call__", _caller(recorder, model, frozenset(), {})))
        stack.enter_context(patched_functions(recorder, model))
        with recorder, recorder.paused():
            model.forward(*args, **kwargs)


def _set_training(model: nn.Module, training: bool) -> None:
    """As ``model.train`` would, but without calling what a model may make of that."""
    for module in model.modules():
        module.training = training


def _recorder(model: nn.Module, shadows: Shadows | None) -> Recorder:
    tape = Tape(_tensor_names(model), type(model), shadows or Shadows(model))
    return Recorder(tape, _device_of(model))


def _tensor_names(model: nn.Module) -> dict[int, str]:
    """The qualified name of every tensor that an attribute of a module holds; the first one if there are
    several."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), f"{path}.{name}" if path else name)
    return names


def _device_of(model: nn.Module) -> torch.device:
    """Where the traced code believes to run."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _caller(
    recorder: Recorder, root: nn.Module, whole: frozenset[str], reasons: dict[str, str]
) -> Callable[..., Any]:
    """What stands in for ``nn.Module.__call__`` while tracing."""
    paths: dict[int, str] = {}
    for path, module in root.named_modules():
        paths.setdefault(id(module), path)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if not recorder.recording or path is None:
            return module.forward(*args, **kwargs)
        if module is not root and (path in whole or is_leaf(module)):
            return recorder.leaf(path, module, args, kwargs)
        mark = recorder.tape.checkpoint()
        try:
            with recorder.tape.inside(path, module):
                return module.forward(*args, **kwargs)
        except TRACE_ERRORS as error:
            recorder.tape.rollback(mark)
            if module is root:
                raise
            try:
                result = recorder.leaf(path, module, args, kwargs)
            except TRACE_ERRORS:
                raise error from None
            reasons[path] = f"{first_line(error)} ({where(error, root)})"
            return result

    return call


def where(error: BaseException, model: nn.Module) -> str:
    """The module of ``model`` whose code an error came from, and the line."""
    paths = {id(module): path for path, module in model.named_modules()}
    module, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            module = f"module {paths[id(owner)]!r}"
        if not code.co_filename.startswith((LIBRARY, PACKAGE)):
            line = f"{code.co_filename}:{number}"
    return ", ".join(part for part in (module, line) if part) or "in the model itself"


def _inputs(
    tape: Tape, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
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
            arguments += [tape.placeholder(f"{name}_{i}", (), item) for i, item in enumerate(value)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            options |= {key: tape.placeholder(key, (), item) for key, item in value.items()}
        else:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            made = tape.placeholder(name, default, value)
            if parameter.kind is parameter.KEYWORD_ONLY:
                options[name] = made
            else:
                arguments.append(made)
    return arguments, options


def remove_dead_code(graph: fx.Graph) -> None:
    """Drop the nodes that nobody reads and that do nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
