"""The command ``train``: its words, and its flags, which are read off the source of what they are for."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.data_sources import NAMES
from fxprune.cli.flags import named_method, option_flag, with_flags
from fxprune.cli.folder import check_folder
from fxprune.cli.methods import Entry, read_entry
from fxprune.cli.reports import AsJson, Threads, set_threads
from fxprune.keywords import TRAINING_METHODS

METHOD = "asni"
FOLDER = Path(__file__).parent.parent / "training" / "methods"

Out = Annotated[
    Path | None, typer.Option(help="Folder in which the run is kept after every epoch, to go on with.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out; with more --epochs, train longer.")
]


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="zoo:NAME, timm:NAME, torchvision:NAME, or path/to/file.py:factory."
        ),
    ],
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits",
    root: Annotated[str, typer.Option(help="The folder that the data are in.")] = "data",
    size: Annotated[int, typer.Option(help="Height and width of the digits; 8 is their own.")] = 8,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"One of {', '.join(TRAINING_METHODS)}; --method NAME --help lists its options.",
        ),
    ] = METHOD,
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="In the end, in (0, 1).")] = None,
    variants: Annotated[str, typer.Option(help="Which of D, A, C, S to train.")] = "DACS",
    out: Out = None,
    resume: Resume = False,
    seed: int = 0,
    device: str = "cpu",
    logdir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of the curves.")] = None,
    threads: Threads = None,
    json_: AsJson = False,
    **given: Any,
) -> None:
    """Train a network dense (D), pruned in training (A), and again from centroids (C) and the start (S)."""
    from fxprune.cli.training_run import Task, train_and_show

    if method not in TRAINING_METHODS:
        raise ValueError(f"--method {method}: expected one of {', '.join(TRAINING_METHODS)}")
    if resume and out is None:
        raise ValueError("--resume: expected --out FOLDER too, the folder of the run to go on with")
    check_folder("--plot", plot)
    set_threads(threads)
    chosen = {name: _value(text) for name, text in given.items() if text is not None}
    recipe = {name: chosen.pop(name) for name in recipe_defaults() if name in chosen}
    task = Task(model, data, root, size, method, sparsity, variants, seed, device, recipe, chosen)
    train_and_show(task, out, resume, logdir, plot, as_json=json_)


def recipe_defaults() -> dict[str, Any]:
    """Read the parts of a training recipe and their defaults off its source.

    >>> recipe_defaults()["epochs"]
    20
    """
    source = Path(__file__).with_name("experiment.py").read_text(encoding="utf-8")
    recipe = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingRecipe"
    )
    return {
        line.target.id: ast.literal_eval(line.value)
        for line in recipe.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None
    }


def training_entries() -> dict[str, Entry]:
    """Read what each training method says of itself off its source."""
    found = {}
    for name, place in TRAINING_METHODS.items():
        file, _, function = place.partition(".")
        found[name] = read_entry(function, (FOLDER / f"{file}.py").read_text(encoding="utf-8"))
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def show_flags(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Give ``train`` its flags; its help shows the options of the method that is named."""
    chosen = named_method(words, settings, METHOD)
    flags: list[inspect.Parameter] = [
        option_flag(name, f"default {default}", "Recipe") for name, default in recipe_defaults().items()
    ]
    notes: dict[str, str | None] = {}
    for name, entry in training_entries().items():
        for option, default in entry.options.items():
            note = f"{entry.notes.get(option, option)} (default {default})"
            notes[option] = note if name == chosen else notes.get(option)
    flags += [option_flag(name, note, f"Options of {chosen}") for name, note in sorted(notes.items())]
    with_flags(train, flags)


show_flags((), {})
