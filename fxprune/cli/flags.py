"""Flags that several commands share: how a network is built, which data, and the options of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fxprune.cli.data_sources import EXPECTED
from fxprune.cli.methods import FOLDER, Entry, read_entries

__all__ = [
    "DATA",
    "NETWORK",
    "complete_method",
    "method_flags",
    "named_method",
    "option_flag",
    "plain_flags",
    "take",
    "with_flags",
]

Plain = Mapping[str, tuple[Any, Any, str]]
"""Name of a flag -> its type, its default and its help."""

NETWORK: Plain = {
    "pretrained": (bool, False, "Take the published weights of a timm or torchvision model."),
    "num_classes": (int | None, None, "Number of outputs."),
    "weights": (Path | None, None, "File of weights: a state dict (.safetensors, .pt), or of fxprune.save."),
}
"""How a network is built."""

DATA: Plain = {
    "data": (
        str | None,
        None,
        f"{EXPECTED} of (x, y) or of batches; for hf:FOLDER also .txt (text), .npy or .npz.",
    ),
    "root": (str, "data", "The folder in which data sets lie that are known by name."),
    "batch_size": (int, 64, "Samples in a batch of data."),
}
"""Which data."""


def plain_flags(table: Plain) -> list[inspect.Parameter]:
    """Make the flags of a table.

    >>> [flag.name for flag in plain_flags(NETWORK)]
    ['pretrained', 'num_classes', 'weights']
    """
    found = []
    for name, (kind, default, text) in table.items():
        spelled = f"--{name.replace('_', '-')}"
        annotation: Any = Annotated[kind, typer.Option(spelled, help=text)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    return found


def take(options: dict[str, Any], table: Plain) -> dict[str, Any]:
    """Take the flags of a table out of ``options``, and return them."""
    return {name: options.pop(name) for name in table if name in options}


def named_method(words: Sequence[str], settings: Mapping[str, Any], default: str) -> str:
    """Return the method that the words of a command name, or else its settings.

    >>> named_method(["prune", "net.py:net", "-m", "snip"], {}, "synflow")
    'snip'
    """
    for index, word in enumerate(words):
        if word in ("-m", "--method") and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--method="):
            return word.partition("=")[2]
    return str(settings.get("method", default))


def complete_method(incomplete: str) -> list[str]:
    """Return the names of the methods that begin with what was typed.

    >>> complete_method("sn")
    ['snip']
    """
    return sorted(entry.name for entry in read_entries(FOLDER) if entry.name.startswith(incomplete))


def method_flags(entries: Iterable[Entry], chosen: str) -> list[inspect.Parameter]:
    """Make one flag for every option of every method; hide those that ``chosen`` does not have."""
    entries = sorted(entries, key=lambda entry: entry.name)
    switches: dict[str, bool] = {}
    notes = {}
    for entry in entries:
        for name, default in entry.options.items():
            switches[name] = switches.get(name, True) and name in entry.switches
            if entry.name == chosen:
                notes[name] = f"{entry.notes.get(name, name)} (default {default})"
    panel = f"Options of {chosen}"
    return [
        option_flag(name, notes.get(name), panel, is_switch=switch)
        for name, switch in sorted(switches.items())
    ]


def option_flag(name: str, note: str | None, panel: str, *, is_switch: bool = False) -> inspect.Parameter:
    """Make a flag; hide it where there is no note on it."""
    spelled = f"--{name.replace('_', '-')}"
    if is_switch:
        spelled += f"/--no-{name.replace('_', '-')}"
    word = typer.Option(
        spelled, help=None if note is None else escape(note), rich_help_panel=panel, hidden=note is None
    )
    kind: Any = Annotated[bool | None, word] if is_switch else Annotated[str | None, word]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def with_flags(function: Callable[..., Any], flags: Sequence[inspect.Parameter]) -> None:
    """Give a command's function more flags, in the place of those that it was given before."""
    if not hasattr(function, "own_parameters"):
        signature = inspect.signature(function, eval_str=True)
        own = [word for word in signature.parameters.values() if word.kind != word.VAR_KEYWORD]
        function.own_parameters = own  # type: ignore[attr-defined]
    words = [*function.own_parameters, *flags]  # type: ignore[attr-defined]
    function.__signature__ = inspect.Signature(words)  # type: ignore[attr-defined]
