"""``fxprune train``: words come in; the accuracies of four networks, their curves and logs go out."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fxprune import data as sources
from fxprune import zoo
from fxprune.cli.experiment import VARIANTS, Comparison, Note, TrainingRecipe, compare
from fxprune.cli.sources import list_models, load_network, make_model
from fxprune.progress import Display
from fxprune.training.methods import METHODS, options

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
RECIPE = {part.name: part.default for part in fields(TrainingRecipe)}


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="zoo:NAME, timm:NAME, torchvision:NAME, or path/to/file.py:factory."
        ),
    ],
    data: Annotated[str, typer.Option(help=f"One of {', '.join(sources.SOURCES)}.")] = "digits",
    root: Annotated[str, typer.Option(help="The folder that the data are in.")] = "data",
    size: Annotated[int, typer.Option(help="Height and width of the digits; 8 is their own.")] = 8,
    method: Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS)}.")] = "asni",
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="In the end, in (0, 1).")] = None,
    variants: Annotated[str, typer.Option(help="Which of D, A, C, S to train.")] = "DACS",
    seed: int = 0,
    device: str = "cpu",
    logdir: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of the curves.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    **given: Any,
) -> None:
    """Train a network dense (D), pruned in training (A), and again from centroids (C) and the start (S)."""
    chosen = {name: _value(text) for name, text in given.items() if text is not None}
    recipe = TrainingRecipe(**{name: chosen.pop(name) for name in RECIPE if name in chosen})
    if method not in METHODS:
        raise ValueError(f"--method {method}: expected one of {', '.join(METHODS)}")
    writer: Any = None if logdir is None else _writer(logdir)
    pair = _load(data, root, size, model)
    make = _maker(model, pair[0], seed)
    note = _note(Display(), model, recipe.epochs * len(set(variants)), writer)
    found = compare(
        make,
        *pair,
        recipe,
        method,
        sparsity,
        variants=variants,
        seed=seed,
        device=device,
        note=note,
        **chosen,
    )
    if writer is not None:
        writer.close()
    if plot is not None:
        _picture(found, plot)
    facts = {
        "model": model,
        "data": data,
        "method": method,
        "options": chosen,
        "epochs": recipe.epochs,
        "seed": seed,
    }
    if json_:
        numbers = {"accuracies": found.accuracies, "sparsity": found.sparsity, "curves": found.curves}
        typer.echo(json.dumps({**facts, **numbers}, indent=2))
        return
    typer.echo(_table(found))


def _note(display: Display, model: str, steps: int, writer: Any) -> Note:
    """Moves a bar and writes logs."""
    bar = iter(display(range(steps), f"train {model}", steps))
    next(bar)

    def note(variant: str, epoch: int, numbers: dict[str, float]) -> None:
        next(bar, None)
        for name, value in numbers.items() if writer is not None else ():
            writer.add_scalar(f"{name}/{variant}", value, epoch)

    return note


def _table(found: Comparison) -> str:
    """The accuracies, and a bar for each epoch between the lowest and the highest of all."""
    every = [value for curve in found.curves.values() for value in curve]
    low, high = min(every), max(every)
    lines = []
    for variant, curve in found.curves.items():
        some = curve[:: -(-len(curve) // WIDTH)]
        heights = [int((value - low) / (high - low or 1) * (len(BARS) - 1) + 0.5) for value in some]
        drawn = "".join(BARS[height] for height in heights)
        sparsity = 0.0 if variant == "D" else found.sparsity
        lines.append(f"{variant}  {VARIANTS[variant]:26} {curve[-1]:7.2%}  {sparsity:8.3%} sparse  {drawn}")
    return "\n".join([*lines, f"bars: accuracy after each epoch, from {low:.1%} to {high:.1%}"])


def _picture(found: Comparison, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'fxprune[plot]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for variant, curve in found.curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=f"{variant}: {VARIANTS[variant]}")
    axes.set(xlabel="epoch", ylabel="test accuracy")
    axes.legend()
    figure.savefig(path)


def _writer(folder: Path) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    except ImportError as error:
        raise ValueError("--logdir needs tensorboard: pip install 'fxprune[plot]'") from error


def _load(data: str, root: str, size: int, model: str) -> tuple[Any, Any]:
    if data != "digits":
        return sources.load(data, root)
    grey = model.startswith(("zoo:lenet", "zoo:conv"))
    channels = 1 if grey else 3
    if ".py:" in model:
        inputs = load_network(model, 0)[1]
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise ValueError(f"{model}: its factory must return a pair of a network and images (N, C, H, W)")
        channels, size = inputs.shape[1], inputs.shape[2]
    return sources.digits(size=size, channels=channels)


def _maker(source: str, train_set: Any, seed: int) -> Callable[[], nn.Module]:
    """Makes the network for the shape and the classes of the data, with the same weights each time."""
    channels, size, _ = train_set[0][0].shape
    targets = train_set.targets if hasattr(train_set, "targets") else train_set.tensors[1]
    classes = int(torch.as_tensor(targets).max()) + 1
    kind, _, name = source.partition(":")
    builders: dict[str, Callable[[], nn.Module]] = {
        "lenet_300_100": lambda: zoo.lenet_300_100(classes, channels * size * size),
        "conv2": lambda: zoo.conv2(classes, channels, size),
        "conv4": lambda: zoo.conv4(classes, channels, size),
        "conv6": lambda: zoo.conv6(classes, channels, size),
        "resnet20": lambda: zoo.resnet20(classes),
        "resnet18_tiny": lambda: zoo.resnet18_tiny(classes),
        "vgg19_bn": lambda: zoo.vgg19_bn(classes),
    }
    if kind == "zoo" and name not in builders:
        raise ValueError(f"{source!r}: the zoo has {', '.join(builders)}")
    if kind not in ("zoo", "timm", "torchvision"):
        return lambda: load_network(source, seed)[0]
    if kind != "zoo" and name not in list_models(kind):
        load_network(source, seed)  # says what is wrong, and what was meant

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "zoo":
                return builders[name]()
            sizes = {"num_classes": classes} | ({"in_chans": channels} if kind == "timm" else {})
            return make_model(kind, name, **sizes)

    return make


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _flags() -> list[inspect.Parameter]:
    """One flag for every part of the recipe, and every option of a training method; its help says whose."""
    found = [_flag(name, f"default {default}", "Recipe") for name, default in RECIPE.items()]
    owners: dict[str, list[str]] = {}
    for method in METHODS:
        for option, default in options(method).items():
            owners.setdefault(option, []).append(f"{method} (default {default})")
    return found + [
        _flag(name, ", ".join(users), "Options of methods") for name, users in sorted(owners.items())
    ]


def _flag(name: str, note: str, panel: str) -> inspect.Parameter:
    word = typer.Option(f"--{name.replace('_', '-')}", help=note, rich_help_panel=panel)
    kind = Annotated[str | None, word]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _register() -> None:
    """Give ``train`` the flags of its recipe and of all training methods."""
    signature = inspect.signature(train, eval_str=True)
    own = [
        parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD
    ]
    train.__signature__ = signature.replace(parameters=own + _flags())  # type: ignore[attr-defined]


_register()
