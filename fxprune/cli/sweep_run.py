"""Run the sweep that a file describes: its tables come in, the results of all cells go out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.cli.experiment import TrainingRecipe, fit
from fxprune.cli.training_run import Task, load_pair, network_maker
from fxprune.data import balanced
from fxprune.keywords import nearest
from fxprune.sweeps import Results
from fxprune.sweeps import sweep as run_cells

KEYS = (
    "batch_size", "data", "device", "granularity", "latency", "methods", "model", "options", "out",
    "per_class", "root", "seeds", "size", "sparsities", "train",
)  # fmt: skip


def run_sweep(wish: dict[str, Any], path: Path, out: Path | None) -> Results:
    """Prune, train and measure what the file asks for.

    Args:
        wish: the contents of the file.
        path: where it is, for messages.
        out: the folder of the results, over ``out`` in the file.

    Raises ``ValueError`` for a key that is none, or one that is missing.
    """
    for key in wish:
        if key not in KEYS:
            near = nearest(key, KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(KEYS)}"
            raise ValueError(f"{path}: {key!r} is no key of a sweep; {hint}")
    for key in ("model", "methods", "sparsities"):
        if key not in wish:
            raise ValueError(f"{path}: {key!r} is missing; docs/sweeps.md has a file in full")
    _check_tables(wish, path)
    recipe = TrainingRecipe(**wish.get("train", {}))
    task = Task(
        wish["model"], wish.get("data", "digits"), wish.get("root", "data"), wish.get("size", 8), "", None,
        "D", 0, wish.get("device", "cpu"), {}, {},
    )  # fmt: skip
    train, test = load_pair(task)
    make = network_maker(task.model, train, None)

    def trained(model: nn.Module, seed: int) -> float:
        return fit(model.to(task.device), train, test, recipe, seed)[-1]

    def batches(seed: int) -> Any:
        return balanced(train, wish.get("per_class", 10), batch_size=wish.get("batch_size"), seed=seed)

    methods = {}
    for label in labels_of(wish):
        own = dict(wish.get("options", {}).get(label, {}))
        methods[label] = (own.pop("method", label), own)
    return run_cells(
        make,
        methods,
        wish["sparsities"],
        wish.get("seeds", [0]),
        trained,
        folder=out or Path(wish.get("out", path.with_suffix(""))),
        data=batches,
        example_inputs=train[0][0][None].expand(2, *train[0][0].shape),
        latency=bool(wish.get("latency", False)),
        granularity=wish.get("granularity", "weight"),
    )


def labels_of(wish: dict[str, Any]) -> list[str]:
    """Return the labels of a file's methods, one or several."""
    methods = wish["methods"]
    return [methods] if isinstance(methods, str) else list(methods)


def _check_tables(wish: dict[str, Any], path: Path) -> None:
    """``ValueError`` for what is no table, and for a key or a label in one that nothing is known of."""
    known = {"train": [one.name for one in fields(TrainingRecipe)], "options": labels_of(wish)}
    for table, names in known.items():
        given = wish.get(table, {})
        if not isinstance(given, dict):
            raise ValueError(f"{path}: {table}={given!r}: expected a table, [{table}]")
        for name, value in given.items():
            if name not in names:
                near = nearest(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}"
                raise ValueError(f"{path}: [{table}] has no {name!r}; {hint}")
            if table == "options" and not isinstance(value, dict):
                raise ValueError(f"{path}: options.{name}={value!r}: expected a table of options")
