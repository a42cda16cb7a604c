"""Words for what a graph does not do, and why modules stay whole."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.capture.fidelity.places import inside
from fxprune.capture.tracer.trace import Trace

__all__ = [
    "COUNTS_BATCH",
    "COUNTS_VALUES",
    "INSTEAD",
    "IN_TRAINING",
    "ONE_BATCH_SIZE",
    "final_notes",
    "hands_on",
    "no_training",
]

IN_TRAINING = " in training; the graph does not"
NOT_RUN = (
    "changes nothing in the graph and does not run with it, for the graph does not call this module; "
    "register it on one that it calls"
)
INSTEAD = "prune with returns='module', which trains as the model does"
COUNTS_VALUES = "it makes a Python number of the numbers in a tensor (by an index, len or range)"
COUNTS_BATCH = "it makes a Python number of the batch size (int, range or iteration)"
ONE_BATCH_SIZE = f"{COUNTS_BATCH}; the graph holds for the batch size of example_inputs"


def final_notes(notes: Mapping[str, str], base: Trace, records: Mapping[str, str]) -> dict[str, str]:
    """Return the notes of a search, and what the graph of ``base`` does not write; none of what is in a call.

    ``records``: what hooks that change nothing write, by the paths of their modules.
    """
    called = {str(node.target) for node in base.graph.nodes if node.op == "call_module"}
    written = {
        path: f"its attribute {name!r} is written by the model; the graph does not"
        for path, name in base.changed.items()
    }
    hooks = {path: f"its hook {name} {NOT_RUN}" for path, name in records.items() if path}
    found = {**{path: hooks[path] for path in hooks.keys() - called}, **notes}
    found |= {path: written[path] for path in written.keys() - called}
    return {path: reason for path, reason in found.items() if not inside(path, called)}


def hands_on(path: str, hook: str) -> str:
    """Say that a hook's graph would depend on the calls before."""
    return (
        f"module {path!r}: its hook {hook} hands something on from one call of the model to the next, which "
        "a graph cannot; remove it (handle.remove()) before the capture"
    )


def no_training(untraced: bool, refusal: str) -> str:
    """Say why there is no trace of training: it cannot be traced, or the model itself fails."""
    fails = "cannot be traced in training mode" if untraced else "fails in training mode with these inputs"
    return f"its forward {fails} ({refusal})"
