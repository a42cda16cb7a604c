"""Run the hooks of modules as part of the traced code, in the order of ``nn.Module.__call__``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.capture.errors import TRACE_ERRORS, HookError, first_line, where
from fxprune.capture.hooks import BACKWARD_TABLES, GLOBAL_TABLES, Hook, hook_name, is_of_pytorch
from fxprune.capture.tracer.questions import Question
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.spelling import is_pure
from fxprune.torch_private import global_hooks_always_called, global_hooks_with_kwargs

__all__ = ["HookCalls"]


@dataclass(frozen=True)
class _Hook:
    """One hook with the options that it was registered with."""

    function: Any
    with_kwargs: bool
    always: bool
    is_global: bool


class HookCalls:
    """Calls the hooks of the modules of ``root``, but for those in ``left_out``."""

    def __init__(self, recorder: Recorder, root: nn.Module, left_out: Collection[Hook]) -> None:
        self.recorder, self.root, self.left_out = recorder, root, left_out

    def around(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[..., Any]
    ) -> Any:
        """Run the pre-hooks of a module, ``call(module, args, kwargs)``, and its forward hooks."""
        for hook in self.hooks(module, "_forward_pre_hooks"):
            args, kwargs = self.before(hook, module, args, kwargs)
        result, pending = None, self.hooks(module, "_forward_hooks")
        try:
            result = call(module, args, kwargs)
            while pending:
                result = self.after(pending.pop(0), module, args, kwargs, result)
        except TRACE_ERRORS:
            for hook in pending:
                if hook.always:
                    with suppress(*TRACE_ERRORS):
                        result = self.after(hook, module, args, kwargs, result)
            raise
        return result

    def before(
        self, hook: _Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as a pre-hook leaves them."""
        changed = self.run(hook, module, args, *([kwargs] if hook.with_kwargs else []))
        if changed is None:
            return args, kwargs
        if module is self.root:
            self.refuse_gradients(hook, module, "arguments")
        if not hook.with_kwargs:
            return (changed if isinstance(changed, tuple) else (changed,)), kwargs
        if not isinstance(changed, tuple) or len(changed) != 2:
            raise self.refused(hook, module, "it has to return None or (args, kwargs)")
        return changed

    def after(
        self, hook: _Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """Return the result as a forward hook leaves it."""
        changed = self.run(hook, module, args, *([kwargs] if hook.with_kwargs else []), result)
        if changed is None:
            return result
        if module is not self.root:
            self.refuse_gradients(hook, module, "result")
        return changed

    def run(self, hook: _Hook, module: nn.Module, *given: Any) -> Any:
        """Run one hook; refuse what a graph cannot do in its place."""
        if not self.recorder.recording:
            return hook.function(module, *given)
        last = self.recorder.tape.checkpoint()[0]
        try:
            result = hook.function(module, *given)
        except HookError:
            raise
        except (*TRACE_ERRORS, Question) as error:
            raise self.refused(hook, module, f"{first_line(error)} ({where(error, self.root)})") from error
        if hook.is_global and (result is not None or self.has_written(last)):
            raise self.refused(hook, module, "it changes what a module computes")
        return result

    def has_written(self, last: Any) -> bool:
        """Whether a node after ``last`` has an effect."""
        for node in reversed(self.recorder.tape.graph.nodes):
            if node is last:
                return False
            if not is_pure(node):
                return True
        return False

    def hooks(self, module: nn.Module, kind: str) -> list[_Hook]:
        """The hooks of one kind that are run for a module, global ones first."""
        return [*self.global_hooks(kind), *self.own_hooks(module, kind)]

    def global_hooks(self, kind: str) -> Iterator[_Hook]:
        named, always = (
            global_hooks_with_kwargs,
            global_hooks_always_called,
        )
        for key, function in GLOBAL_TABLES[kind].items():
            if not is_of_pytorch(function):
                after = kind == "_forward_hooks"
                yield _Hook(function, after and key in named, after and key in always, True)

    def own_hooks(self, module: nn.Module, kind: str) -> Iterator[_Hook]:
        named = getattr(module, f"{kind}_with_kwargs", {})
        always = getattr(module, f"{kind}_always_called", {})
        for key, function in getattr(module, kind, {}).items():
            if (id(module), key) not in self.left_out and not is_of_pytorch(function):
                yield _Hook(function, key in named, key in always, False)

    def refuse_gradients(self, hook: _Hook, module: nn.Module, changed: str) -> None:
        """Backward hooks of a module see gradients of what its other hooks have made of its values."""
        if any(getattr(module, table, None) for table in BACKWARD_TABLES):
            raise self.refused(hook, module, f"it changes the {changed} of a module with backward hooks")

    def refused(self, hook: _Hook, module: nn.Module, reason: str) -> HookError:
        paths = {id(inner): path for path, inner in self.root.named_modules()}
        path = paths.get(id(module))
        place = f"module {path!r}" if path else type(module).__name__
        name, kind = hook_name(hook.function), "global hook" if hook.is_global else "hook"
        return HookError(
            f"{place}: its {kind} {name} cannot be traced: {reason}; remove it (handle.remove()) before the "
            "capture and register it on the captured model"
        )
