"""Run the command line. Only the module of the command that was asked for is imported: help needs no PyTorch.

A bad argument is one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

import fxprune
from fxprune.cli.config import read_config, take_config
from fxprune.cli.wording import in_flags

COMMANDS = {
    "prune": ("fxprune.cli.pruning", "Prune a network and report what is left of it."),
    "plan": (
        "fxprune.cli.planning",
        "Say which channels would go, layer by layer, and what that saves; nothing is changed.",
    ),
    "analyze": (
        "fxprune.cli.reports",
        "Report on a network, dense or pruned: density, effective paths, nodes, kernels, multiply-adds.",
    ),
    "methods": ("fxprune.cli.methods", "List the methods, what they need and their options."),
    "bench": (
        "fxprune.cli.bench",
        "Measure a network dense, masked and compact: milliseconds, sizes, memory.",
    ),
    "export": (
        "fxprune.cli.exporting",
        "Write a network, or what prune wrote, as .onnx or .pt2; run and compared when written.",
    ),
    "graph": ("fxprune.cli.reports", "Show the channel and kernel graph that a network is lowered to."),
    "groups": ("fxprune.cli.groups", "List the channels that can only be removed together."),
    "train": (
        "fxprune.cli.train",
        "Train a network dense (D), pruned in training (A), and again from centroids (C) and the start (S).",
    ),
    "sweep": (
        "fxprune.cli.sweeping",
        "Prune and train every cell of a grid of methods, sparsities and seeds; go on where it was stopped.",
    ),
    "plot": (
        "fxprune.cli.sweeping",
        "Draw accuracy, nodes and paths against sparsity, accuracy against latency, and densities of layers.",
    ),
}
"""Name of a command -> the module with a function of that name, and the first line of its docstring."""

CONFIGURED = ("prune", "plan", "analyze", "bench", "export", "train")
"""Commands that take ``--config FILE``."""

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

# Every error that typer finds in the words themselves; it is not exported by that name.
UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process, with 0, 1 (it failed) or 2 (a bad argument)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    words = list(arguments) or ["--help"]
    if words[0] in ("--version", "-V"):
        typer.echo(f"fxprune {fxprune.__version__}")
        return 0
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            code = _run(words)
            if code == INTERRUPTED:  # how typer ends on Ctrl-C
                raise KeyboardInterrupt
        except UsageError as error:
            return _fail(error.format_message(), 2)
        except (OSError, TypeError, ValueError, ImportError) as error:
            return _fail(error, 2)
        except (KeyboardInterrupt, typer.Abort):
            return _fail("interrupted; files are whole or not there", INTERRUPTED)
        except RuntimeError as error:
            return _fail(error, 2 if _is_capture_error(error) else 1)
        for warning in noted:
            if warning.category is UserWarning:
                typer.echo(f"fxprune: warning: {_one_line(warning.message)}", err=True)
    return code if isinstance(code, int) else 0


def _run(words: list[str]) -> object:
    """Build the application for its words and run it."""
    chosen = _completed() or words[0]
    settings: dict[str, Any] = {}
    if chosen in CONFIGURED:
        words, path = take_config(words)
        if path is not None:
            settings = read_config(path, _flags(chosen))
    if chosen == "bench":
        words = importlib.import_module("fxprune.cli.bench").spread(words)
    app = _app(chosen, words, settings)
    return app(words, prog_name="fxprune", standalone_mode=False, default_map={chosen: settings})


def _app(chosen: str, words: Sequence[str], settings: dict[str, Any]) -> typer.Typer:
    """Build the application: the command called ``chosen`` in full, of the others name and help."""
    app = typer.Typer(
        name="fxprune",
        # The list of commands does without rich, which would take most of the time.
        rich_markup_mode="rich" if chosen in COMMANDS else None,
        help="A compiler pass that prunes any PyTorch network, on its graph. --version says which.",
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (module, summary) in COMMANDS.items():
        function: Callable[..., object] = lambda: None  # noqa: E731  # never called
        if name == chosen:
            home = importlib.import_module(module)
            function = getattr(home, name)
            if hasattr(home, "show_flags"):
                home.show_flags(words, settings)
        app.command(name, help=None if name == chosen else summary)(function)
    return app


def _flags(command: str) -> dict[str, str]:
    """Return the name of each flag and argument of a command, and of its parameter."""
    tree: Any = typer.main.get_command(_app(command, [], {}))
    found = {}
    for parameter in tree.commands[command].params:
        found[parameter.name.strip("_").replace("_", "-")] = parameter.name
    return found


def _completed() -> str:
    """Return the command whose words a shell asks to complete; empty where none does."""
    if not any(name.endswith("_COMPLETE") and "FXPRUNE" in name for name in os.environ):
        return ""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
    words = line.split()
    return words[1] if len(words) > 1 and words[1] in COMMANDS else ""


def _is_capture_error(error: RuntimeError) -> bool:
    """Return whether a model could not be captured; if none was, nothing is imported to find out."""
    capture = sys.modules.get("fxprune.capture")
    return capture is not None and isinstance(error, capture.CaptureError)


def _fail(error: object, code: int) -> int:
    typer.echo(f"fxprune: error: {_one_line(error)}", err=True)
    return code


def _one_line(text: object) -> str:
    return in_flags(" ".join(str(text).split()))
