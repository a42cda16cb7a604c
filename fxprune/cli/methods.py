"""The command ``methods``: read what each method says of itself off its source, without importing PyTorch.

The factory of a method is called like its file. Its keyword arguments are the options, and it calls
``Method(...)`` with literals for name, needs, summary and paper.
"""

from __future__ import annotations

import ast
import difflib
import json
import pkgutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.option_notes import option_notes
from fxprune.papers import Paper, bibtex, citable, papers_of

FOLDER = Path(__file__).parent.parent / "methods"
COLUMNS = {"method": 14, "what it does": 42, "needs": 5, "options": 36, "paper": 35}
"""Title of a column -> its width in characters."""


@dataclass(frozen=True)
class Entry:
    """Hold what a method's source says of it.

    ``options``: name -> default. ``notes``: name -> its line in the docstring. ``switches``: the options that
    are true or false.
    """

    name: str
    summary: str
    needs: list[str]
    options: dict[str, Any]
    paper: str
    notes: dict[str, str] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()


def methods(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    cite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Print BibTeX entries for a method's papers.", autocompletion=citable
        ),
    ] = None,
) -> None:
    """List the methods, what they need and their options."""
    if cite is not None:
        typer.echo(bibtex(_known_papers(cite)))
        return
    entries = sorted(read_entries(FOLDER), key=lambda entry: entry.name)
    if json_:
        rows = {
            entry.name: {
                "summary": entry.summary,
                "needs": entry.needs,
                "options": entry.options,
                "paper": entry.paper,
            }
            for entry in entries
        }
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(_row(COLUMNS) + "\n" + _row("-" * width for width in COLUMNS.values()))
    for entry in entries:
        flags = (f"--{name.replace('_', '-')}={value}" for name, value in entry.options.items())
        typer.echo(_row((entry.name, entry.summary, " ".join(entry.needs), " ".join(flags), entry.paper)))


def _known_papers(name: str) -> list[Paper]:
    """Return the papers of a method; ``ValueError`` with the nearest names for an unknown one."""
    found = papers_of(name)
    if not found:
        known = citable()
        near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"--cite {name}: no such method; {hint}")
    return found


def _row(cells: Iterable[str]) -> str:
    """Write cells side by side, each wrapped to the width of its column."""
    widths = COLUMNS.values()
    parts = [
        textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(cells, widths, strict=True)
    ]
    return "\n".join(
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in zip_longest(*parts, fillvalue="")
    )


def read_entries(folder: Path) -> list[Entry]:
    """Read the entries of all methods in ``folder``, a file or a package each."""
    entries = []
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.name.startswith("_"):
            path = folder / module.name / "__init__.py" if module.ispkg else folder / f"{module.name}.py"
            entries.append(read_entry(module.name, path.read_text(encoding="utf-8")))
    return entries


def read_entry(factory: str, source: str) -> Entry:
    """Read what the function ``factory`` in ``source`` says of its method.

    Raises ``ValueError`` where it is not a literal, or there is no such function.

    >>> entry = read_entry("one", "def one(*, rounds=3): return Method(name='one', find=f, paper='1999')")
    >>> entry.name, entry.needs, entry.options, entry.paper
    ('one', [], {'rounds': 3}, '1999')
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == factory:
            break
    else:
        raise ValueError(f"factory={factory!r}: there is no function of that name")
    words: dict[str, Any] = {"name": factory, "summary": "", "needs": frozenset(), "paper": ""}
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Method":
            words |= {word.arg: _literal(word.value) for word in call.keywords if word.arg in words}
    options = {
        argument.arg: _literal(default)
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is not None
    }
    annotations = {word.arg: ast.unparse(word.annotation) for word in node.args.kwonlyargs if word.annotation}
    return Entry(
        words["name"],
        words["summary"],
        sorted(words["needs"]),
        options,
        words["paper"],
        option_notes(ast.get_docstring(node) or ""),
        frozenset(name for name, annotation in annotations.items() if annotation == "bool"),
    )


def _literal(node: ast.expr) -> Any:
    """Evaluate a literal, or ``frozenset(literal)``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset":
        node = node.args[0] if node.args else ast.Tuple([])
    return ast.literal_eval(node)
