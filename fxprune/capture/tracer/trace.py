"""One run of a model under the recorder.

In: a model, its arguments (meta tensors), the mode to trace in and the modules to keep whole. Out: a
:class:`Trace`. The model is left as it was.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import CaptureError, Overwritten
from fxprune.capture.hooks import Hook
from fxprune.capture.tracer.calls_replaced import calls_go_to
from fxprune.capture.tracer.entries import Decision, Scope
from fxprune.capture.tracer.isolation import Changes, ModelState, rng_state
from fxprune.capture.tracer.memos import Cache, Memos
from fxprune.capture.tracer.meta_values import Shadows
from fxprune.capture.tracer.module_calls import Caller, CallSettings
from fxprune.capture.tracer.patches import patched_functions
from fxprune.capture.tracer.questions import Question
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.spelling import is_pure
from fxprune.capture.tracer.tape import Tape
from fxprune.capture.tracer.values import Values
from fxprune.capture.tracer.whole_numbers import follows_int

__all__ = ["Rehearsal", "Trace", "remove_dead_code", "shapes_only", "trace"]


@dataclass
class Trace:
    """Hold what one run left behind.

    ``constants`` are tensors that belong to no module, ``scope`` says which module call made which node,
    ``decisions`` what the code made depend on sizes,
    ``reasons`` why a module had to stay whole, ``changed`` which entered modules wrote which attribute
    of themselves, ``hook_writes`` which hooks of which module wrote something of their own. ``memos`` is what
    depends on no input. ``reads`` are the nodes that read numbers from tensors. ``refilled``: the caches
    that were emptied hold what they held. ``drew``: random numbers outside of PyTorch.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    scope: Scope
    decisions: list[Decision] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    hook_writes: dict[str, str] = field(default_factory=dict)
    memos: Memos = field(default_factory=Memos)
    reads: list[fx.Node] = field(default_factory=list)
    refilled: bool = True
    drew: bool = False

    def path_of(self, node: fx.Node) -> str:
        """The path of the module whose code made a node."""
        return list(node.meta["nn_module_stack"])[-1] if node.meta["nn_module_stack"] else ""


@dataclass(frozen=True)
class Rehearsal:
    """Describe a run before the one that is recorded.

    ``sizes``: what it computed from the sizes of its inputs is computed again where those are the same.
    """

    training: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    sizes: bool = False


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    training: bool,
    whole: frozenset[str] = frozenset(),
    shadows: Shadows | None = None,
    state: ModelState | None = None,
    rehearsed: Rehearsal | None = None,
    left_out: frozenset[Hook] = frozenset(),
    caches: Sequence[Cache] = (),
    values: Callable[[], Values] = Values,
    may_draw: bool = False,
) -> Trace:
    """Record ``model(*args, **kwargs)``; ``whole`` names modules that are not entered.

    ``rehearsed``: a run before this one has left its traces in the model's attributes. ``left_out`` are hooks
    that are not run. ``caches`` are empty when the run begins; the trace says whether it filled them again.
    ``values`` makes what is known of numbers in tensors. ``may_draw``: random numbers outside of PyTorch are
    drawn, and not refused.
    """
    shadows = shadows or Shadows(model)
    changes = Changes()
    state = state or ModelState(model)
    names = _tensor_names(model)  # of the tensors that are there before a run leaves others

    def run(setting: CallSettings, given: tuple[Any, ...], memos: Memos | None = None) -> Trace:
        tape = _tape(model, names, shadows, memos, values())
        return copy_context().run(_run, model, given[0], given[1], setting, tape, state)

    def from_start(setting: CallSettings) -> Trace:
        for cache in caches:
            cache.entries.pop(cache.key, None)
        memos = None
        if rehearsed is not None:
            _set_training(model, rehearsed.training)
            memos = run(setting, (rehearsed.args, rehearsed.kwargs)).memos
            memos = memos.with_sizes() if rehearsed.sizes else memos
        _set_training(model, training)
        before = rng_state(state.generators)
        result = run(setting, (args, kwargs), memos)
        result.drew = rng_state(state.generators) != before
        return result

    with state.restored(changes, shadows.written):
        result = from_start(CallSettings(whole, left_out))
        if result.drew and not may_draw:
            state.restore()
            watching = CallSettings(whole, left_out, watching=True, generators=state.generators)
            result = from_start(watching)
        result.refilled = training or result.memos.explain(caches, model)
    leaves = {str(node.target) for node in result.graph.nodes if node.op == "call_module"}
    result.hook_writes = changes.hooks
    for path, name in changes.attributes.items():
        atoms = path.split(".")
        if not any(".".join(atoms[:i]) in leaves for i in range(1, len(atoms) + 1)):
            result.changed[path] = name
    return result


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    setting: CallSettings,
    tape: Tape,
    state: ModelState,
) -> Trace:
    tape.namespaces = state.namespaces
    recorder = Recorder(tape, _device_of(model))
    result = Trace(tape.graph, tape.constants, tape.scope, tape.decisions, setting.reasons)
    arguments, options = _inputs(tape, model, args, kwargs)
    caller = Caller(recorder, model, setting)
    with ExitStack() as stack:
        stack.enter_context(_patched(caller, state))
        stack.enter_context(torch.enable_grad())
        with recorder:
            try:
                out = caller.hooks.around(model, arguments, options, caller.call)
            except Question as question:
                raise CaptureError(question.text) from None
        tape.output(out)
    if tape.overwritten:
        raise Overwritten(tuple(tape.overwritten))
    result.memos, result.reads = tape.finished(), tape.reads
    return result


def shapes_only(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Evaluate the model in shapes, unrecorded: raises what it says itself to these inputs."""
    recorder = Recorder(_tape(model, _tensor_names(model), Shadows(model)), _device_of(model))
    state = ModelState(model)
    caller = Caller(recorder, model, CallSettings())
    with ExitStack() as stack:
        stack.enter_context(state.restored(Changes()))
        _set_training(model, False)
        stack.enter_context(_patched(caller, state))
        with recorder, recorder.paused():
            caller.hooks.around(model, args, dict(kwargs), caller.call)


@contextmanager
def _patched(caller: Caller, state: ModelState) -> Iterator[None]:
    """Replace the calls of modules, and all functions that PyTorch does not report, while a model runs."""
    with (
        calls_go_to(caller.replacement()),
        patched_functions(caller.recorder, state.places),
        follows_int(state.namespaces.followed),
    ):
        yield


def _set_training(model: nn.Module, training: bool) -> None:
    """As ``model.train`` would, but without calling what a model may make of that."""
    for module in model.modules():
        module.training = training


def _tape(
    model: nn.Module,
    names: dict[int, str],
    shadows: Shadows,
    memos: Memos | None = None,
    values: Values | None = None,
) -> Tape:
    tape = Tape(names, type(model), shadows, memos, values)
    state = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for buffer in model.buffers():
        if (
            id(buffer) in names
            and id(buffer) not in state
            and not (buffer.is_meta or buffer.is_floating_point())
        ):
            tape.integers[names[id(buffer)]] = buffer
    return tape


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
    """Return the device on which the traced code believes to run."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _inputs(
    tape: Tape, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders for the arguments of ``forward``, and those given as the model is to see them.

    Arguments left to their default have a placeholder, too, but are not passed: what wraps ``forward`` may
    tell the two apart.
    """
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    for name, parameter in signature.parameters.items():
        if (
            parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name not in bound.arguments
        ):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            items = bound.arguments[name]
            bound.arguments[name] = tuple(tape.placeholder(f"{name}_{i}", (), x) for i, x in enumerate(items))
        elif parameter.kind is parameter.VAR_KEYWORD:
            items = bound.arguments[name]
            bound.arguments[name] = {key: tape.placeholder(key, (), x) for key, x in items.items()}
        elif name in bound.arguments:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            bound.arguments[name] = tape.placeholder(name, default, bound.arguments[name])
        else:
            tape.placeholder(name, (parameter.default,), parameter.default)
    named = {name: bound.arguments.pop(name) for name in kwargs if name in bound.arguments}
    return bound.args, {**bound.kwargs, **named}


def remove_dead_code(graph: fx.Graph) -> None:
    """Drop the nodes that nobody reads and that do nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
