"""Run the command line. Only the module of the command that was asked for is imported: help needs no PyTorch.

A bad argument is one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

COMMANDS = {
    "prune": ("fxprune.cli.pruning", "Prune a network and report what is left of it."),
    "plan": (
        "fxprune.cli.planning",
        "Say which channels would go, layer by layer, and what that saves; nothing is changed.",
    ),
    "analyze": (
        "fxprune.cli.pruning",
        "Report on a network, dense or pruned: density, effective paths, nodes, kernels, multiply-adds.",
    ),
    "methods": ("fxprune.cli.methods", "List the methods, what they need and their options."),
    "bench": (
        "fxprune.cli.bench",
        "Measure a network dense, masked and compact: milliseconds, sizes, memory.",
    ),
    "graph": ("fxprune.cli.pruning", "Show the channel and kernel graph that a network is lowered to."),
    "groups": ("fxprune.cli.groups", "List the channels that can only be removed together."),
    "train": (
        "fxprune.cli.train",
        "Train a network dense (D), pruned in training (A), and again from centroids (C) and the start (S).",
    ),
}
"""Name of a command -> the module with a function of that name, and the first line of its docstring."""

# Every error that typer finds in the words themselves; it is not exported by that name.
UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process, with 0, 1 (it failed) or 2 (a bad argument)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    words = list(arguments) or ["--help"]
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            app = _app(words[0])
            if words[0] == "bench":
                words = importlib.import_module("fxprune.cli.bench").spread(words)
            code = app(words, standalone_mode=False)
        except UsageError as error:
            return _fail(error.format_message(), 2)
        except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
            return _fail(error, 2)
        except RuntimeError as error:
            return _fail(error, 2 if _is_capture_error(error) else 1)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        for warning in noted:
            if warning.category is UserWarning:
                typer.echo(f"fxprune: warning: {_one_line(warning.message)}", err=True)
    return code if isinstance(code, int) else 0


def _app(chosen: str) -> typer.Typer:
    """Build the application: the command called ``chosen`` in full, of the others name and help."""
    app = typer.Typer(
        name="fxprune",
        # The list of commands does without rich, which would take most of the time.
        rich_markup_mode="rich" if chosen in COMMANDS else None,
        help="A compiler pass that prunes any PyTorch network, on its graph.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (module, summary) in COMMANDS.items():
        function: Callable[..., object] = lambda: None  # noqa: E731  # never called
        if name == chosen:
            function = getattr(importlib.import_module(module), name)
        app.command(name, help=None if name == chosen else summary)(function)
    return app


def _is_capture_error(error: RuntimeError) -> bool:
    """Return whether a model could not be captured; if none was, nothing is imported to find out."""
    capture = sys.modules.get("fxprune.capture")
    return capture is not None and isinstance(error, capture.CaptureError)


def _fail(error: object, code: int) -> int:
    typer.echo(f"fxprune: error: {_one_line(error)}", err=True)
    return code


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
