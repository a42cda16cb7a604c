"""Run what ``fxprune train`` was asked for: a task comes in; accuracies, curves and logs go out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from fxprune import data as sources
from fxprune import zoo
from fxprune.cli.experiment import VARIANTS, Comparison, Note, TrainingRecipe, compare
from fxprune.cli.runs import SavedRun
from fxprune.cli.sources import LIBRARIES, list_models, load_network, make_model
from fxprune.progress import Display

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


@dataclass(frozen=True)
class Task:
    """Hold the words of the command; ``recipe`` and ``options`` are those that were given."""

    model: str
    data: str
    root: str
    size: int
    method: str
    sparsity: float | None
    variants: str
    seed: int
    device: str
    recipe: dict[str, Any]
    options: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Return what tells one run from another; the number of epochs may grow."""
        recipe = {name: value for name, value in self.recipe.items() if name != "epochs"}
        return {
            "model": self.model, "data": self.data, "size": self.size, "method": self.method,
            "sparsity": self.sparsity, "seed": self.seed, **recipe, **self.options,
        }  # fmt: skip


def train_and_show(
    task: Task, out: Path | None, resume: bool, logdir: Path | None, plot: Path | None, *, as_json: bool
) -> None:
    """Train the networks that ``task`` names, and print how well they do.

    Args:
        task: what to train.
        out: the folder of the run, where it is kept.
        resume: go on with the run in it.
        logdir: folder for TensorBoard logs.
        plot: file for a picture of the curves.
        as_json: print JSON instead of a table.

    Raises ``ValueError`` for a folder that holds a run unless it is resumed, and for one of another run.
    """
    recipe = TrainingRecipe(**task.recipe)
    saved = None if out is None else SavedRun(out, task.facts(), recipe.epochs, resume=resume)
    writer: Any = None if logdir is None else _writer(logdir)
    pair = load_pair(task)
    note = _note(Display(), task.model, recipe.epochs * len(set(task.variants)), writer)
    found = compare(
        network_maker(task.model, pair[0], task.seed),
        *pair,
        recipe,
        task.method,
        task.sparsity,
        variants=task.variants,
        seed=task.seed,
        device=task.device,
        note=note,
        saved=saved,
        **task.options,
    )
    if writer is not None:
        writer.close()
    if plot is not None:
        _picture(found, plot)
    if saved is not None and not saved.trained:
        typer.echo(f"fxprune: {out}: this run was finished, nothing was trained", err=True)
    if as_json:
        facts = {"model": task.model, "data": task.data, "method": task.method, "options": task.options,
                 "epochs": recipe.epochs, "seed": task.seed}  # fmt: skip
        numbers = {"accuracies": found.accuracies, "sparsity": found.sparsity, "curves": found.curves}
        typer.echo(json.dumps({**facts, **numbers}, indent=2))
        return
    typer.echo(_table(found))


def _note(display: Display, model: str, steps: int, writer: Any) -> Note:
    """Moves a bar and writes logs."""
    bar = iter(display(range(steps), f"train {model}", steps))
    next(bar, None)

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


def load_pair(task: Task) -> tuple[Any, Any]:
    """Load the data of a task, to train and to test, with as many channels as its network takes."""
    model, size = task.model, task.size
    if task.data != "digits":
        return sources.load(task.data, task.root)
    grey = model.startswith(("zoo:lenet", "zoo:conv"))
    channels = 1 if grey else 3
    if ".py:" in model:
        inputs = load_network(model, 0)[1]
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise ValueError(f"{model}: its factory must return a pair of a network and images (N, C, H, W)")
        channels, size = inputs.shape[1], inputs.shape[2]
    return sources.digits(size=size, channels=channels)


def _check_outputs(source: str, network: nn.Module, sample: torch.Tensor, classes: int) -> None:
    """``ValueError`` for a network with fewer outputs than the data have classes."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = network.eval()(sample[None].expand(2, *sample.shape))
    if isinstance(found, torch.Tensor) and found.dim() == 2 and found.shape[1] < classes:
        raise ValueError(
            f"{source!r}: it has {found.shape[1]} outputs, and the data {classes} classes; let its factory"
            f" return one with {classes}"
        )


def network_maker(source: str, train_set: Any, seed: int | None) -> Callable[[], nn.Module]:
    """Make networks for the shape and the classes of the data, with the weights of ``seed`` each time.

    Without a seed weights are drawn from the global random state.
    """
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
    if kind not in ("zoo", *LIBRARIES):
        _check_outputs(source, load_network(source, _seed(seed))[0], train_set[0][0], classes)
        return lambda: load_network(source, _seed(seed))[0]
    if kind != "zoo" and name not in list_models(kind):
        load_network(source, _seed(seed))  # says what is wrong, and what was meant

    def make() -> nn.Module:
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build()
        return build()

    def build() -> nn.Module:
        if kind == "zoo":
            return builders[name]()
        sizes = {"num_classes": classes} | ({"in_chans": channels} if kind == "timm" else {})
        return make_model(kind, name, **sizes)

    return make


def _seed(seed: int | None) -> int:
    """Return a seed, or draw one from the global random state."""
    return int(torch.randint(2**31, ())) if seed is None else seed
