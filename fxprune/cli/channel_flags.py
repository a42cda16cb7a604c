"""The flags of ``prune`` that say how channels are pruned."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

HELP = {
    "pool": (str, "One score of those of a group's weights: mean, sum, l2 or max."),
    "of": (
        str,
        "What the sparsity is a share of: weights (prunable ones), params (all), macs, memory or latency.",
    ),
    "scope": (
        str,
        "What competes: global, layer (each loses the same share), uniform (and equal ones stay equal) or "
        "isomorphic (each kind loses the same share).",
    ),
    "round_to": (int, "Layers keep a multiple of so many channels."),
    "min_channels": (str, "Layers keep at least so many channels: a number, or layer=number,..."),
    "max_sparsity": (str, "Layers lose at most this share of channels: a number, or layer=number,..."),
    "sides": (str, "Weights that a channel group is scored by: both, or rows alone."),
    "normalize": (
        str,
        "Divide scores of groups by a mean over: none, their family, or as the method has it.",
    ),
    "runtime": (str, "Of --of latency: eager, compile or onnxruntime."),
    "threads": (int, "Threads to compute with, and to measure with; as many as PyTorch takes."),
    "at_most": (float, "Instead of --sparsity, what may stay, in the unit of --of: MACs, bytes, ms."),
}


def channel_flags() -> list[inspect.Parameter]:
    """One flag for every option of the granularities channel and head."""
    found = []
    for name, (kind, text) in HELP.items():
        flag = typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Options of channels")
        annotation: Any = Annotated[kind | None, flag]
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return found


def take_threads(options: dict[str, Any]) -> int | None:
    """Return the number of threads; leave it in ``options`` where channels are chosen by time."""
    threads: int | None = options.get("threads")
    if options.get("of") != "latency":
        options.pop("threads", None)
    return threads


def split(options: dict[str, Any]) -> dict[str, Any]:
    """Take the channel options that were given out of ``options``, and return them."""
    taken = {name: options.pop(name, None) for name in HELP}
    for name, kind in (("min_channels", int), ("max_sparsity", float)):
        if taken[name] is not None:
            taken[name] = read_by_layer(f"--{name.replace('_', '-')}", taken[name], kind)
    return {name: value for name, value in taken.items() if value is not None}


def read_by_layer(
    flag: str,
    text: str,
    kind: type[int] | type[float],
    expected: str = "expected a number, or layer=number",
) -> float | dict[str, float]:
    """Read a number, or numbers by layer: ``layer=number,...``.

    Raises ``ValueError``, which says what is ``expected``, for other text, and for a number without a layer
    that does not stand alone.

    >>> read_by_layer("--max-sparsity", "layer4.*=0.5,fc=0.9", float)
    {'layer4.*': 0.5, 'fc': 0.9}
    >>> read_by_layer("--min-channels", "8", int)
    8
    """
    entries = {}
    for entry in text.split(","):
        pattern, _, value = (part.strip() for part in entry.rpartition("="))
        try:
            entries[pattern] = kind(value)
        except ValueError as error:
            raise ValueError(f"{flag} {text}: {expected}, not {entry!r}") from error
        if not pattern and text.strip() != value:
            raise ValueError(f"{flag} {text}: {expected}; {entry!r} names no layer")
    return entries[""] if list(entries) == [""] else entries
