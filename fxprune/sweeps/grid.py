"""Prune, train and measure every cell of a grid: methods, sparsities and seeds come in, a table goes out."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.api import analyze, apply
from fxprune.capture.errors import check_module
from fxprune.keywords import TRAINING_METHODS
from fxprune.latency import measure
from fxprune.methods import Method
from fxprune.methods import get as get_method
from fxprune.progress import Display
from fxprune.rewrite.compact import compact
from fxprune.sweeps.claims import Claims
from fxprune.sweeps.grid_arguments import (
    check_entries,
    check_folder,
    check_functions,
    forked_rng,
    numbers_of,
    seed_all,
    seeds_of,
    sparsities_of,
)
from fxprune.training.checkpoints import write_bytes

__all__ = ["Results", "read_results", "sweep"]

FORMAT = 1
FILE, TABLE, CELLS = "sweep.json", "table.md", "cells"
DENSE = "dense"
WAIT = 1.0
"""Seconds between looks for the results of other processes."""

Entries = Mapping[str, tuple[str | Method, Mapping[str, Any]]]
TrainFunction = Callable[[nn.Module, int], float | Mapping[str, float]]
"""``train_fn(model, seed)``: trains in place; returns the accuracy, or several numbers by name."""


NO_LATENCY: dict[str, Any] = {"milliseconds compact": None, "parameters compact": None}
"""What is noted of a network that was cut to nothing; its training goes on."""


@dataclass(frozen=True)
class Cell:
    """One network to prune and train."""

    method: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        label = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.method)
        return f"{label}-{self.sparsity!r}-{self.seed}"


@dataclass(frozen=True)
class Results:
    """Hold what a sweep found.

    ``rows``: one dict per cell: ``method``, ``sparsity``, ``seed``; what ``train_fn`` returned; and of pruned
    networks ``kept``, ``effective``, ``nodes``, ``kernels``, ``log_paths`` (natural logarithm), ``densities``
    by layer, ``seconds`` that pruning took and, where asked for, ``milliseconds`` of dense and compact
    and the ``parameters`` of compact, None where it was cut to nothing.
    ``failed``: name of a cell -> the error that it ended in; another call tries it again.
    """

    rows: list[dict[str, Any]]
    failed: dict[str, str] = field(default_factory=dict)

    def summary(self) -> list[dict[str, Any]]:
        """Mean and standard deviation over seeds of every number, by method and sparsity."""
        groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault((row["method"], row["sparsity"]), []).append(row)
        found = []
        for (method, sparsity), some in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
            line: dict[str, Any] = {"method": method, "sparsity": sparsity, "seeds": len(some)}
            for key in [
                key for key in some[0] if _is_number(some[0][key]) and key not in ("sparsity", "seed")
            ]:
                values = [row[key] for row in some if _is_number(row.get(key))]
                line[key] = statistics.fmean(values)
                line[f"{key} ±"] = statistics.stdev(values) if len(values) > 1 else 0.0
            found.append(line)
        return found

    def __str__(self) -> str:
        lines, failed = self.summary(), [f"failed: {name}: {error}" for name, error in self.failed.items()]
        if not lines:
            return "\n".join(["no cell is done", *failed])
        keys = list(dict.fromkeys(key for line in lines for key in line if not key.endswith(" ±")))
        rows = ["| " + " | ".join(keys) + " |", "| " + " | ".join(["---"] * len(keys)) + " |"]
        rows += ["| " + " | ".join(_cell(line, key) for key in keys) + " |" for line in lines]
        return "\n".join(rows + failed)


def sweep(
    model_fn: Callable[[], nn.Module],
    methods: Iterable[str | Method] | Mapping[str, Any],
    sparsities: Iterable[float],
    seeds: Iterable[int] = (0,),
    train_fn: TrainFunction | None = None,
    *,
    folder: str | Path,
    data: Any = None,
    latency: bool = False,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Prune, train and measure every cell of methods, sparsities and seeds once, and keep it in a folder.

    Args:
        model_fn: returns the network; it is called under the seed of each cell.
        methods: names or :class:`fxprune.Method` objects; or label -> (method, options of ``apply``).
        sparsities, seeds: lists, or one number. With a ``train_fn`` each seed is trained dense too.
        train_fn: ``train_fn(model, seed)`` trains in place and returns an accuracy, or numbers by name.
        folder: where results are kept. A cell that is there is not done again, so that a sweep that was
            killed goes on; processes on any machines that share the folder divide the cells among them.
        data: for methods that look at data, as for :func:`fxprune.apply`; a function is called with the seed.
        latency, progress: measure the dense and the compact network in turn; show bars, or lines, on stderr.
        options: of :func:`fxprune.apply`, for all cells.

    Returns:
        The :class:`Results` of all cells; ``folder/table.md`` is up to date after each.

    Raises ``TypeError`` or ``ValueError`` before the first cell: arguments that do not fit, those of a method
    included; a folder of another sweep. Later errors of cells are named in ``failed``, and in a warning.

    >>> import tempfile, torch
    >>> def net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = sweep(net, ["magnitude"], [0.5, 0.75], folder=folder, example_inputs=torch.ones(1, 4))
    >>> [row["kept"] for row in found.rows]
    [24, 12]
    """
    display = Display(enabled=progress)
    check_functions(model_fn, train_fn, data, latency=latency)
    entries, folder = _entries(methods), check_folder(folder)
    cells = _cells(entries, sparsities_of(sparsities), seeds_of(seeds), train_fn is not None)
    if open_cells := [c for c in cells if not (folder / CELLS / f"{c.name}.json").is_file()]:
        check_entries(model_fn, entries, open_cells, data, options)
    _describe(folder, entries, options)
    claims = Claims(folder / CELLS)
    work, failed = _Work(model_fn, entries, train_fn, data, latency, options), dict[str, str]()
    for cell in display(cells, "sweep", len(cells)):
        if claims.read(cell.name) is None:
            _do(cell, work, claims, failed)
            _write_table(folder, cells, claims, failed)
    with display.step("sweep: wait for the cells that other processes are at work on"):
        while left := [c for c in cells if c.name not in failed and claims.read(c.name) is None]:
            for cell in left:
                _do(cell, work, claims, failed)
            time.sleep(WAIT)
    for name, error in failed.items():
        warnings.warn(f"sweep: {name} failed: {error}", stacklevel=2)
    return _write_table(folder, cells, claims, failed)


def read_results(folder: str | Path) -> Results:
    """Read what a sweep has kept in ``folder`` so far.

    Raises ``FileNotFoundError`` or ``ValueError`` where it is no folder of a sweep, or of another version.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{folder}: not a folder of a sweep; expected one with {FILE}")
    _check_version(folder, json.loads((folder / FILE).read_text(encoding="utf-8")))
    paths = sorted((folder / CELLS).glob("*.json"))
    return Results([json.loads(path.read_text(encoding="utf-8")) for path in paths])


@dataclass(frozen=True)
class _Work:
    """Hold what is done in each cell."""

    model_fn: Callable[[], nn.Module]
    entries: Entries
    train_fn: TrainFunction | None
    data: Any
    latency: bool
    options: Mapping[str, Any]

    def row(self, cell: Cell) -> dict[str, Any]:
        """Prune, count, measure and train one network."""
        with forked_rng():
            seed_all(cell.seed)
            model = self.model_fn()
            check_module(model, "model_fn()")
            found: dict[str, Any] = {"method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed}
            if cell.method != DENSE:
                model, numbers = self._pruned(model, cell)
                found |= numbers
            if self.train_fn is not None:
                seed_all(cell.seed)
                found |= numbers_of(self.train_fn(model, cell.seed))
        return found

    def _pruned(self, dense: nn.Module, cell: Cell) -> tuple[nn.Module, dict[str, Any]]:
        method, own = self.entries[cell.method]
        data = self.data(cell.seed) if callable(self.data) else self.data
        wish = {"progress": False, **self.options, **own}
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of collapse: it is in the numbers
            pruned = apply(dense, method, cell.sparsity, data=data, seed=cell.seed, **wish)
        seconds = time.perf_counter() - start
        report = analyze(pruned, example_inputs=self.options.get("example_inputs"))
        numbers: dict[str, Any] = {
            "kept": report.kept_params,
            "effective": report.effective_params,
            "nodes": report.effective_nodes,
            "kernels": report.effective_kernels,
            "log_paths": report.log_paths if math.isfinite(report.log_paths) else None,
            "densities": report.layer_density,
            "seconds": round(seconds, 3),
        }
        if self.latency:
            numbers |= self._latency(dense, pruned) if math.isfinite(report.log_paths) else NO_LATENCY
        return pruned, numbers

    def _latency(self, dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
        """Measure the dense and the compact network in turn."""
        given = self.options.get("example_inputs")
        small = compact(pruned, given, progress=False)
        timings = measure({"dense": dense, "compact": small}, given)
        found: dict[str, Any] = {f"milliseconds {one.network}": one.median for one in timings}
        return found | {"parameters compact": sum(one.numel() for one in small.parameters())}


def _entries(methods: Iterable[str | Method] | Mapping[str, Any]) -> Entries:
    """Return label -> (method, options), each checked to exist."""
    if isinstance(methods, (str, Method)):
        methods = [methods]
    found: dict[str, tuple[str | Method, Mapping[str, Any]]] = {}
    named: Mapping[str, Any] = (
        methods
        if isinstance(methods, Mapping)
        else {one if isinstance(one, str) else one.name: one for one in methods}
    )
    for label, entry in named.items():
        method, own = entry if isinstance(entry, tuple) else (entry, {})
        if isinstance(method, str) and method in TRAINING_METHODS:
            raise ValueError(
                f"methods: {method!r} prunes while a network trains, and a sweep before it does; take a "
                "fxprune.Pruner in a loop of your own"
            )
        if isinstance(method, str):
            get_method(method)
        elif not isinstance(method, Method):
            raise TypeError(f"methods[{label!r}]={method!r}: expected a method's name or a fxprune.Method")
        found[label] = (method, own)
    if DENSE in found:
        raise ValueError(f"methods: {DENSE!r} is the label of the network that is not pruned; take another")
    return found


def _cells(labels: Iterable[str], sparsities: list[float], seeds: list[int], trains: bool) -> list[Cell]:
    """List the cells of a grid, seed by seed, each after its dense network where there is training."""
    cells: list[Cell] = []
    for seed in seeds:
        cells += [Cell(DENSE, 0.0, seed)] if trains else []
        cells += [Cell(label, sparsity, seed) for sparsity in sparsities for label in labels]
    return cells


def _do(cell: Cell, work: _Work, claims: Claims, failed: dict[str, str]) -> None:
    with claims.claim(cell.name) as mine:
        if mine:
            try:
                claims.write(cell.name, work.row(cell))
            except (RuntimeError, ValueError) as error:
                failed[cell.name] = " ".join(str(error).split())


def _describe(folder: Path, entries: Entries, options: Mapping[str, Any]) -> None:
    """Note what the labels mean; refuse a folder in which they mean something else."""
    own = {label: [str(getattr(method, "name", method)), _plain({**options, **words})]
           for label, (method, words) in entries.items()}  # fmt: skip
    path = folder / FILE
    known: dict[str, Any] = {"format": FORMAT, "methods": {}}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        _check_version(folder, known)
    for label, meant in own.items():
        before = known["methods"].get(label, meant)
        if before != meant:
            raise ValueError(
                f"folder={str(folder)!r}: there {label!r} is {before}, not {meant}; take another label, or"
                " another folder"
            )
    every = {"format": FORMAT, "methods": {**known["methods"], **own}}
    if every != known or not path.is_file():
        write_bytes(path, (json.dumps(every, indent=1) + "\n").encode())


def _check_version(folder: Path, known: Mapping[str, Any]) -> None:
    if known.get("format") != FORMAT:
        raise ValueError(
            f"folder={str(folder)!r}: results of format {known.get('format')!r}, this fxprune reads {FORMAT};"
            " nothing was changed, take another folder"
        )


def _plain(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that can be written down, without tensors and functions."""
    return {
        key: repr(value) for key, value in sorted(options.items()) if _is_plain(value) and key != "progress"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _write_table(folder: Path, cells: Sequence[Cell], claims: Claims, failed: dict[str, str]) -> Results:
    found = Results(list(_rows(cells, claims)), failed)
    write_bytes(folder / TABLE, f"{found}\n".encode())
    return found


def _rows(cells: Sequence[Cell], claims: Claims) -> Iterator[dict[str, Any]]:
    for cell in cells:
        row = claims.read(cell.name)
        if row is not None:
            yield row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key, "")
    spread = line.get(f"{key} ±", 0.0)
    if not isinstance(value, float) or key == "sparsity":
        return str(value)
    return f"{_short(value, 4)} ± {_short(spread, 2)}" if spread else _short(value, 4)


def _short(value: float, digits: int) -> str:
    """Write a number with so many digits, and no exponent where it is large."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"
