"""Record calls of modules by the traced code: a module is entered, or becomes one node.

In: calls of ``nn.Module.__call__``. Out: their results, with everything inside on the tape. A module that
cannot be traced becomes a node by itself, with the reason noted.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import (
    TRACE_ERRORS,
    CaptureError,
    HookError,
    failing_method,
    first_line,
    is_raised,
    where,
)  # fmt: skip
from fxprune.capture.hooks import Hook, keeps_hooks
from fxprune.capture.leaves import is_compiled, is_leaf
from fxprune.capture.tracer.call_targets import MethodCall
from fxprune.capture.tracer.hook_calls import HookCalls
from fxprune.capture.tracer.isolation import restore_rng, rng_state
from fxprune.capture.tracer.questions import Question, TrialOver
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.replacing import replaced
from fxprune.capture.tracer.sample_values import needs_numbers
from fxprune.capture.tracer.spelling import changes_input

__all__ = ["CallSettings", "Caller"]


@dataclass(frozen=True)
class CallSettings:
    """Hold the settings of the calls of one trace.

    ``whole`` names the modules not to enter; ``left_out`` are hooks that are not run; ``reasons`` gets the
    modules that could not be entered. ``watching``: look which modules draw random numbers outside PyTorch,
    also from ``generators`` of their own.
    """

    whole: frozenset[str] = frozenset()
    left_out: frozenset[Hook] = frozenset()
    reasons: dict[str, str] = field(default_factory=dict)
    watching: bool = False
    generators: tuple[Any, ...] = ()


class Caller:
    """Calls the modules of ``root``."""

    def __init__(self, recorder: Recorder, root: nn.Module, setting: CallSettings) -> None:
        self.recorder, self.root, self.setting = recorder, root, setting
        self.hooks = HookCalls(recorder, root, setting.left_out)
        self.paths: dict[int, str] = {}
        for path, module in root.named_modules():
            self.paths.setdefault(id(module), path)
        self.compiling = False
        self.answers = recorder.tape.values.answers

    def replacement(self) -> Callable[..., Any]:
        """Stand in for ``nn.Module.__call__``."""

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.hooks.around(module, args, kwargs, self.call)

        return call

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_compiled(module):
            return self.hooks.around(cast(nn.Module, module._orig_mod), args, kwargs, self.call)
        if self.recorder.recording:
            self.answers.went_on()
        path = self.paths.get(id(module))
        if not self.recorder.recording or path is None:
            return module.forward(*args, **kwargs)
        if module is self.root:
            return self.enter(path, module, args, kwargs)
        if path in self.setting.whole or keeps_hooks(module):
            if self.borrows(module):
                raise CaptureError(f"it lends {path} other parameters, but that has to stay whole")
            return self.leaf(path, module, args, kwargs)
        if is_leaf(module) and not self.borrows(module) and not self.holds_results(module):
            return self.leaf(path, module, args, kwargs)
        enter = self.inside if is_leaf(module) else self.enter
        return enter(path, module, args, kwargs)

    def borrows(self, module: nn.Module) -> bool:
        """Whether a module runs on parameters that are not its own, as under ``functional_call``."""
        own = self.recorder.tape.names
        return any(id(parameter) not in own for parameter in module.parameters())

    def holds_results(self, module: nn.Module) -> bool:
        """Whether the traced code has put tensors that it computed into attributes of a module."""
        tape = self.recorder.tape
        tables = [table for inner in module.modules() for table in (vars(inner), inner._buffers)]
        values = [value for table in tables for value in table.values() if isinstance(value, Tensor)]
        return any(id(value) not in tape.names and tape.find(value) for value in values)

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace the inside; if that fails, take the module as a whole."""
        try:
            return self.inside(path, module, args, kwargs)
        except HookError:
            raise
        except TRACE_ERRORS as error:
            reason = error
        if needs_numbers(reason) and not self.compiling:
            # Code that looks at its data often has another way for compilers, which does not.
            with suppress(*TRACE_ERRORS):
                return self.as_compiler(path, module, args, kwargs)
        if module is self.root and self.answers.take_example():
            return self.enter(path, module, args, kwargs)
        if module is self.root:
            return self.without_methods(path, module, args, kwargs, reason)
        try:
            result = self.leaf(path, module, args, kwargs)
        except TRACE_ERRORS:
            raise reason from None
        self.setting.reasons[path] = f"{first_line(reason)} ({where(reason, self.root, path)})"
        return result

    def inside(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace the inside, again with each answer that it needs."""
        while True:
            try:
                return self.once(path, module, args, kwargs)
            except Question as question:
                asked = question
            errors = {
                answer: self.tried(asked, answer, path, module, args, kwargs) for answer in (True, False)
            }
            self.answers.settle(asked, errors, by_example=module is self.root and self.answers.by_example)
            if self.recorder.tape.values.reached and self.answers.is_open(asked):
                self.reach_more(asked, path, module, args, kwargs)

    def reach_more(
        self, question: Question, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Assume the answer after which the code does all that it does after the other one, and more.

        Raises ``CaptureError`` where the answers lead to different things: neither is all that may be,
        or where no parameter is in what is more: it may cut off what was there, as zeros would. What the
        result is not made of does not count: another layer may have taken its place.
        """
        tape, done, answer = self.recorder.tape, [], None
        try:
            for assumed in (False, True):
                self.answers.assume(question, assumed)
                start, before = tape.checkpoint(), set(tape.graph.nodes)
                ends = tape.arg(self.inside(path, module, args, kwargs))
                new = {node for node in tape.graph.nodes if node not in before}
                done.append(Counter(_work(node) for node in _read_for(ends, new)))
                tape.rollback(start)
            less, more = sorted(done, key=Counter.total)
            reads = any(work[:1] == ("call_module",) or work[2:] for work in more - less)
            if not (less < more and reads):
                raise CaptureError(question.text)
            answer = more is done[1]
        finally:
            self.answers.assume(question, answer)

    def tried(
        self, question: Question, answer: bool, path: str, module: nn.Module, args: Any, kwargs: Any
    ) -> Exception | None:
        """Return the code's own error after an answer; None if it goes on."""
        start = self.recorder.tape.checkpoint()
        with self.answers.trial(question, answer), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.once(path, module, args, kwargs)
            except TrialOver:
                return None
            except TRACE_ERRORS as error:
                return error if is_raised(error) else None
        self.recorder.tape.rollback(start)
        return None

    def once(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape = self.recorder.tape
        start, before = tape.checkpoint(), self.rng_state()
        try:
            with ExitStack() as stack:
                if module is not self.root:
                    stack.enter_context(tape.inside(path, module))
                result = module.forward(*args, **kwargs)
            if self.rng_state() != before:
                self.restore_rng(before)
                raise CaptureError("its forward draws random numbers outside PyTorch, which a graph cannot")
            return result
        except (*TRACE_ERRORS, Question, TrialOver):
            tape.rollback(start)
            if self.setting.watching:  # else the modules around would seem to have drawn
                self.restore_rng(before)
            raise

    def without_methods(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: Exception
    ) -> Any:
        """Trace the inside with those methods as nodes that look at numbers."""
        first = reason
        with ExitStack() as stack:
            kept: set[tuple[type, str]] = set()
            while True:
                found = failing_method(reason) if needs_numbers(reason) else None
                if found is None or (type(found[0]), found[1]) in kept:
                    raise reason
                owner, name = found
                kept.add((type(owner), name))
                stack.enter_context(replaced(type(owner), name, self.method(owner, name)))
                try:
                    result = self.inside(path, module, args, kwargs)
                except AttributeError:  # the method uses submodules, which stay behind
                    raise first from None
                except TRACE_ERRORS as error:
                    reason = error
                    continue
                words = ", ".join(sorted(f"{kind.__name__}.{method}" for kind, method in kept))
                place = where(reason, self.root, path)
                self.setting.reasons[path] = f"{words} kept whole: {first_line(reason)} ({place})"
                return result

    def method(self, owner: nn.Module, name: str) -> Callable[..., Any]:
        """Stand in for a method of ``owner`` that is not entered."""
        original = getattr(type(owner), name)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not owner or not self.recorder.recording:
                return original(module, *args, **kwargs)
            return self.recorder.method(MethodCall.of(owner, name), args, kwargs)

        return call

    def rng_state(self) -> tuple[Any, ...]:
        return rng_state(self.setting.generators) if self.setting.watching else ()

    def restore_rng(self, state: tuple[Any, ...]) -> None:
        restore_rng(state, self.setting.generators)

    def leaf(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a module, which may draw what it likes."""
        before = self.rng_state()
        try:
            return self.recorder.leaf(path, module, args, kwargs)
        finally:
            if self.setting.watching:
                self.restore_rng(before)

    def as_compiler(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.compiling = True
        try:
            with replaced(torch.compiler, "is_compiling", lambda: True):
                return self.inside(path, module, args, kwargs)
        finally:
            self.compiling = False


def _read_for(ends: Any, new: set[fx.Node]) -> set[fx.Node]:
    """Find the nodes among ``new`` that ``ends`` are made of, or that write into something."""
    open_ = [node for node in new if changes_input(node)]
    fx.node.map_arg(ends, open_.append)
    found: set[fx.Node] = set()
    while open_:
        node = open_.pop()
        if node in new and node not in found:
            found.add(node)
            open_ += node.all_input_nodes
    return found


def _work(node: fx.Node) -> tuple[Any, ...]:
    """Describe a node by its call and its parameters: these have nodes where they were read first."""
    read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return (node.op, str(node.target), *read) if node.op != "get_attr" else ()
