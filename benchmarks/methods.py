"""All methods, trained from their masks: accuracy, effective nodes, kernels, ln paths, seconds, milliseconds.

    python benchmarks/methods.py run                  # digits: 90, 98 and 99.5 %, three seeds
    python benchmarks/methods.py run fashion-mnist    # and the milliseconds of the compact networks
    python benchmarks/methods.py table                # the pages, from what is there

The digits are scikit-learn's 1797 of 8 x 8 pixels, 360 held out; Fashion-MNIST is read from Debian's package
dataset-fashion-mnist. Methods that look at data get ten images of each class. Every network is trained in the
same way, for the same number of steps. A run goes on where it stopped: cells are those of `fxprune.sweep`,
in a folder of the cache, and results are added to a file next to this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fxprune
from fxprune import zoo
from fxprune.cli.experiment import TrainingRecipe, accuracy
from fxprune.data import balanced, digits, fashion_mnist

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune" / "methods"
FASHION = "/usr/share/datasets/fashion-mnist"
PLOT, NOTES = DOCS / "methods.svg", HERE / "methods_notes.md"
SPARSITIES = (0.9, 0.98, 0.995)
SEEDS = (0, 1, 2)


def vit() -> nn.Module:
    """16 patches of 2 x 2 pixels, four blocks of width 64: 200 thousand weights."""
    model: nn.Module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=3, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )
    return model


@dataclass(frozen=True)
class Part:
    """Hold what is run on one set of data: networks, images of an epoch, and entries of the table."""

    load: Callable[[], tuple[TensorDataset, TensorDataset]]
    side: int
    networks: dict[str, tuple[Callable[[], nn.Module], TrainingRecipe]]
    entries: dict[str, tuple[str, dict[str, Any]]]
    results: Path
    images: int | None = None
    latency: bool = False


DIGITS = Part(
    load=lambda: digits(channels=3),
    side=8,
    networks={
        "resnet20": (zoo.resnet20, TrainingRecipe(10, 64, 0.1, 5e-4, "sgd", "cosine")),
        "vit": (vit, TrainingRecipe(20, 64, 2e-3, 0.0, "adam", "cosine")),
    },
    # Two simple ones also under the budget of the strong baselines.
    entries={
        **{name: (name, {}) for name in fxprune.list_methods()},
        "random, erk": ("random", {"budget": "erk"}),
        "magnitude, erk": ("magnitude", {"budget": "erk"}),
    },
    results=HERE / "methods.jsonl",
)
FORESIGHT = ("dpai", "npb", "balance", "px", "force", "grasp", "snip", "synflow", "phew", "magnitude")
CLOTHES = Part(
    load=lambda: fashion_mnist(FASHION, channels=3),
    side=28,
    networks={"resnet20": (zoo.resnet20, TrainingRecipe(3, 128, 0.1, 5e-4, "sgd", "cosine"))},
    entries={**{name: (name, {}) for name in FORESIGHT}, "random, erk": ("random", {"budget": "erk"})},
    results=HERE / "foresight.jsonl",
    images=10_000,
    latency=True,
)
PARTS = {"digits": DIGITS, "fashion-mnist": CLOTHES}


def trainer(part: Part, recipe: TrainingRecipe) -> Callable[[nn.Module, int], dict[str, float]]:
    """Return a function that trains a network in place, and measures it."""
    data, test = part.load()

    def train(model: nn.Module, seed: int) -> dict[str, float]:
        optimizer = recipe.make_optimizer(model)
        order = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(data, num_samples=part.images, generator=order)
        loader = DataLoader(data, recipe.batch, sampler=sampler, drop_last=True)
        model.train()
        for epoch in range(1, recipe.epochs + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        if fxprune.masks(model):
            fxprune.verify(model)
        return {"accuracy": accuracy(model, test)}

    return train


def rows(part: Part) -> list[dict[str, Any]]:
    """Read what was measured."""
    return (
        [json.loads(line) for line in part.results.read_text().splitlines()] if part.results.exists() else []
    )


def run(name: str, seeds: Iterable[int], networks: Iterable[str]) -> None:
    """Sweep over what is missing."""
    torch.set_num_threads(1)
    part = PARTS[name]
    done = {(row["network"], row["method"], row["sparsity"], row["seed"]) for row in rows(part)}
    for seed in seeds:
        for network in networks:
            build, recipe = part.networks[network]
            train = trainer(part, recipe)
            for sparsity in SPARSITIES:
                missing = {
                    entry: way for entry, way in part.entries.items()
                    if (network, entry, sparsity, seed) not in done
                }  # fmt: skip
                if not missing:
                    continue
                found = fxprune.sweep(
                    build, missing, [sparsity], [seed], train, folder=CACHE / name / network,
                    data=lambda seed: balanced(part.load()[0], 10, seed=seed), latency=part.latency,
                    example_inputs=torch.ones(1, 3, part.side, part.side),
                )  # fmt: skip
                with part.results.open("a") as file:
                    for row in found.rows:
                        key = (network, row["method"], row["sparsity"], row["seed"])
                        if key not in done:
                            done.add(key)
                            row = {"network": network} | {k: v for k, v in row.items() if k != "densities"}
                            file.write(json.dumps(row) + "\n")


# -- pages --------------------------------------------------------------------------------------------------
INTRODUCTIONS = {
    "digits": """# Methods on handwritten digits

Made by `python benchmarks/methods.py`; do not edit.

scikit-learn's digits (1437 of 8 x 8 pixels to train on, 360 held out), three seeds. Means; accuracy in per
cent with its deviation; natural logarithm of paths, at spatial resolution; seconds of one thread, capture and
all. Budgets are the methods' own: global, or ERK for `dpai`, `npb`, `balance` and where it says so.

![accuracy against density](methods.svg)
""",
    "fashion-mnist": """# Foresight methods against milliseconds

Made by `python benchmarks/methods.py`; do not edit.

ResNet-20 on Fashion-MNIST (28 x 28), pruned before training, trained for three epochs of 10,000 images,
measured on all 10,000 test images. Means; accuracy in per cent with its deviation. "parameters" and
"speed-up" are those of the network that `fxprune.compact` makes of the masks, beside the dense one: its
parameters, and milliseconds of a forward at batch 1 on one thread, measured in turn. Unstructured masks free
only channels that no path uses. Cells that are not here have not been run.

One seed and three short epochs: a point or two say little, and seconds were measured beside other work.
Random masks under ERK come second here; the papers, which train for a hundred epochs and more, do not find
that, and why it is so was not examined. Speed goes to masks that leave whole channels unused: few nodes, a
high "ln paths".
""",
}


def _mean(found: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in found)


def _columns(part: Part) -> dict[str, Callable[[list[dict[str, Any]]], str]]:
    """Return the columns of a table: head, and what it says of the rows of a cell."""

    def accuracies(found: list[dict[str, Any]]) -> str:
        shares = [100 * row["accuracy"] for row in found]
        spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
        return f"{statistics.mean(shares):.1f}{spread}"

    def speed_up(found: list[dict[str, Any]]) -> str:
        whole = [row for row in found if row.get("milliseconds compact")]
        ratios = [row["milliseconds dense"] / row["milliseconds compact"] for row in whole]
        return f"{statistics.mean(ratios):.2f} x" if ratios else "cut to nothing"

    def parameters(found: list[dict[str, Any]]) -> str:
        whole = [row["parameters compact"] for row in found if row.get("parameters compact")]
        return f"{statistics.mean(whole):,.0f}" if whole else "none"

    def paths(found: list[dict[str, Any]]) -> str:
        if any(row["log_paths"] is None for row in found):  # a network without a path
            return "-inf"
        return f"{_mean(found, 'log_paths'):.1f}"

    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "accuracy": accuracies,
        "nodes": lambda found: f"{_mean(found, 'nodes'):.0f}",
        "kernels": lambda found: f"{_mean(found, 'kernels'):.0f}",
        "ln paths": paths,
        "seconds": lambda found: f"{_mean(found, 'seconds'):.1f}",
    }
    return columns | ({"parameters": parameters, "speed-up": speed_up} if part.latency else {})


def page(name: str) -> str:
    """The page of one part: accuracy first, the best above, then what the graph says."""
    part, lines = PARTS[name], [INTRODUCTIONS[name]]
    every, columns = rows(part), _columns(part)
    for network in part.networks:
        dense = [row for row in every if row["network"] == network and row["method"] == "dense"]
        lines += [f"## {network}", "", f"Dense: {100 * _mean(dense, 'accuracy'):.1f} %.", ""]
        for sparsity in SPARSITIES:
            found = {entry: _cell(every, network, entry, sparsity) for entry in part.entries}
            found = {entry: some for entry, some in found.items() if some}
            if not found:
                continue
            seeds = max(len(some) for some in found.values())
            more = f", {seeds} seed{'s' * (seeds > 1)}" if part.latency else ""
            lines += [f"### {100 * sparsity:g} % removed{more}", ""]
            lines += [f"| method | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
            for entry in sorted(found, key=lambda one: -_mean(found[one], "accuracy")):
                cells = [say(found[entry]) for say in columns.values()]
                lines.append(f"| {entry} | {' | '.join(cells)} |")
            lines.append("")
    if part is DIGITS and NOTES.exists():
        lines.append(NOTES.read_text().rstrip())
    return "\n".join(lines).rstrip() + "\n"


def _cell(every: list[dict[str, Any]], network: str, entry: str, sparsity: float) -> list[dict[str, Any]]:
    wanted = (network, entry, sparsity)
    return [row for row in every if (row["network"], row["method"], row["sparsity"]) == wanted]


def plot(part: Part) -> None:
    """Draw accuracy against density, one panel for each network."""
    from matplotlib.figure import Figure

    every, figure = rows(part), Figure(figsize=(11, 5), layout="constrained")
    for axes, network in zip(figure.subplots(1, 2), part.networks, strict=True):
        for i, entry in enumerate(part.entries):
            found = {sparsity: _cell(every, network, entry, sparsity) for sparsity in SPARSITIES}
            points = [(100 * (1 - s), 100 * _mean(some, "accuracy")) for s, some in found.items() if some]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="os^vDP*X"[i % 8], label=entry, lw=1, ms=4,
                    color=f"C{i % 10}", ls="-" if i < 10 else "--" if i < 20 else ":",
                )  # fmt: skip
        axes.set(title=network, xlabel="density, %", ylabel="accuracy, %", xscale="log")
        axes.set_xticks([0.5, 2, 10], ["0.5", "2", "10"])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(PLOT)


PAGES = {"digits": DOCS / "methods.md", "fashion-mnist": DOCS / "foresight.md"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("part", nargs="?", choices=tuple(PARTS), default="digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--networks", nargs="+")
    given = parser.parse_args()
    if given.what == "run":
        run(given.part, given.seeds, given.networks or PARTS[given.part].networks)
        return
    for name, path in PAGES.items():
        if rows(PARTS[name]):
            path.write_text(page(name))
    plot(DIGITS)


if __name__ == "__main__":
    main()
