"""The commands ``sweep`` and ``plot``: measure a grid that a file describes, and draw what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxprune
from fxprune.cli.config import read_toml
from fxprune.cli.reports import Threads, set_threads

PICTURES = {
    "accuracy.png": ("accuracy", "sparsity"),
    "nodes.png": ("nodes", "sparsity"),
    "paths.png": ("log_paths", "sparsity"),
    "latency.png": ("accuracy", "milliseconds compact"),
}
"""Name of a picture -> the numbers that it shows, one against the other."""


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file; docs/sweeps.md has one.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results, over the file's own.")] = None,
    threads: Threads = None,
) -> None:
    """Prune and train every cell of a grid of methods, sparsities and seeds; go on where it was stopped."""
    from fxprune.cli.sweep_run import run_sweep

    set_threads(threads)
    typer.echo(run_sweep(read_toml(config, "CONFIG"), config, out))


def plot(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder of a sweep.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; that of the results.")] = None,
) -> None:
    """Draw accuracy, nodes and paths against sparsity, accuracy against latency, and densities of layers."""
    rows = fxprune.sweeps.read_results(results).rows
    folder = out or results
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (y, x) in PICTURES.items():
        if any(row.get(y) is not None and row.get(x) is not None for row in rows):
            fxprune.plot.compare(rows, y, x).savefig(folder / name, dpi=150)
            written.append(name)
    if any("densities" in row for row in rows):
        fxprune.plot.layer_densities(rows).savefig(folder / "densities.png", dpi=150)
        written.append("densities.png")
    if not written:
        raise ValueError(f"{results}: no results to draw yet")
    typer.echo("\n".join(str(folder / name) for name in written))
