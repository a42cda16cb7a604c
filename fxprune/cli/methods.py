"""The command ``methods``: read what each method says of itself off its source, without importing PyTorch.

The factory of a method is called like its file. Its keyword arguments are the options, and it calls
``Method(...)`` with literals for name, needs, summary and paper.
"""

from __future__ import annotations

import ast
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

FOLDER = Path(__file__).parent.parent / "methods"
TABLE_WIDTH = 140


@dataclass(frozen=True)
class Entry:
    """Hold what the list shows of a method. ``options``: name -> default."""

    name: str
    summary: str
    needs: list[str]
    options: dict[str, Any]
    paper: str


def methods(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the methods, what they need and their options."""
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
    table = Table("method", "what it does", "needs", "options", "paper", box=SIMPLE, pad_edge=False)
    for entry in entries:
        flags = (f"--{name.replace('_', '-')}={value}" for name, value in entry.options.items())
        cells = (entry.name, entry.summary, ", ".join(entry.needs), " ".join(flags), entry.paper)
        table.add_row(*map(escape, cells))
    Console(width=TABLE_WIDTH).print(table)


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

    >>> read_entry("one", "def one(*, rounds=3): return Method(name='one', find=f, paper='1999')")
    Entry(name='one', summary='', needs=[], options={'rounds': 3}, paper='1999')
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
    return Entry(words["name"], words["summary"], sorted(words["needs"]), options, words["paper"])


def _literal(node: ast.expr) -> Any:
    """Evaluate a literal, or ``frozenset(literal)``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset":
        node = node.args[0] if node.args else ast.Tuple([])
    return ast.literal_eval(node)
