"""Find hooks that only look on: without them, the model computes the same in both modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from fxprune.capture.fidelity.compare import computes_same
from fxprune.capture.hooks import Hook, similar_hooks
from fxprune.capture.tracer.trace import Trace

__all__ = ["find_observers"]


def find_observers(
    model: nn.Module, paths: Mapping[int, str], attempt: Callable[..., Trace | None]
) -> tuple[dict[Hook, nn.Module], dict[str, str]]:
    """Return the hooks without which both traces are the same, and what they write, by path.

    Hooks of the same code count together. ``paths``: of modules, by their ``id``; ``attempt`` makes traces.
    """
    observers: dict[Hook, nn.Module] = {}
    groups = similar_hooks(model)
    traces = [attempt(training=mode, strict=not mode) for mode in (False, True)] if groups else []
    for group in groups:
        without = [attempt(training=mode, left_out=frozenset(group)) for mode in (False, True)]
        if all(a is None or (b and computes_same(a, b)) for a, b in zip(traces, without, strict=True)):
            observers |= group
    observed = {paths[id(module)] for module in observers.values()}
    records: dict[str, str] = {}
    for found in traces:
        writes = found.hook_writes if found else {}
        records.update({path: writes[path] for path in writes.keys() & observed})
    return observers, records
