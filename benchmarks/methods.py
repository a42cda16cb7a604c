"""All methods on digits: accuracy after a fixed training, effective nodes, kernels, ln paths, seconds.

    python benchmarks/methods.py run      # 90, 98 and 99.5 %, three seeds; goes on where it stopped
    python benchmarks/methods.py table    # docs/methods.md and docs/methods.svg from what is there

The digits are scikit-learn's 1797 of 8 x 8 pixels, 360 held out. Methods that look at data get ten images of
each class. Every network is trained in the same way, for the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import zoo
from fxprune.cli.experiment import TrainingRecipe, accuracy
from fxprune.data import balanced, digits

HERE = Path(__file__).parent
RESULTS, PAGE, PLOT = (
    HERE / "methods.jsonl",
    HERE.parent / "docs" / "methods.md",
    HERE.parent / "docs" / "methods.svg",
)
NOTES = HERE / "methods_notes.md"
SPARSITIES = (0.9, 0.98, 0.995)
SEEDS = (0, 1, 2)


def vit() -> nn.Module:
    """16 patches of 2 x 2 pixels, four blocks of width 64: 200 thousand weights."""
    model: nn.Module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=3, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], TrainingRecipe]] = {
    "resnet20": (zoo.resnet20, TrainingRecipe(10, 64, 0.1, 5e-4, "sgd", "cosine")),
    "vit": (vit, TrainingRecipe(20, 64, 2e-3, 0.0, "adam", "cosine")),
}
# Name in the table: method and options. Two simple ones also under the budget of the strong baselines.
ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in fxprune.list_methods()},
    "random, erk": ("random", {"budget": "erk"}),
    "magnitude, erk": ("magnitude", {"budget": "erk"}),
}


def train(model: nn.Module, data: TensorDataset, recipe: TrainingRecipe, seed: int) -> None:
    optimizer = recipe.make_optimizer(model)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch)
        for x, y in DataLoader(data, recipe.batch, shuffle=True, generator=order, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def measure(network: str, entry: str, sparsity: float, seed: int, data: tuple[Any, Any]) -> dict[str, Any]:
    """One network pruned, counted and trained."""
    build, recipe = NETWORKS[network]
    torch.manual_seed(seed)
    model = build()
    row: dict[str, Any] = {"network": network, "method": entry, "sparsity": sparsity, "seed": seed}
    if entry != "dense":
        method, options = ENTRIES[entry]
        loader = balanced(data[0], 10, seed=seed)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of collapse: it is in the figures
            model = fxprune.apply(
                model, method, sparsity, example_inputs=torch.ones(1, 3, 8, 8), data=loader, seed=seed,
                progress=False, **options,
            )  # fmt: skip
        row["seconds"] = round(time.perf_counter() - start, 2)
        report = fxprune.analyze(model)
        row |= {
            "nodes": report.effective_nodes, "kernels": report.effective_kernels,
            "log_paths": round(report.log_paths, 2), "effective": report.effective_params,
        }  # fmt: skip
    train(model, data[0], recipe, seed)
    if entry != "dense":
        fxprune.verify(model)
    return row | {"accuracy": accuracy(model, data[1])}


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(only: str | None) -> None:
    torch.set_num_threads(1)
    data = digits(channels=3)
    done = {(row["network"], row["method"], row["sparsity"], row["seed"]) for row in rows()}
    for seed in SEEDS:
        for network in NETWORKS:
            if only is not None and network != only:
                continue
            cases = [("dense", 0.0), *((entry, s) for s in SPARSITIES for entry in ENTRIES)]
            for entry, sparsity in cases:
                if (network, entry, sparsity, seed) not in done:
                    row = measure(network, entry, sparsity, seed, data)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def _mean(found: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in found)


def _cells(found: list[dict[str, Any]]) -> list[str]:
    shares = [100 * row["accuracy"] for row in found]
    spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return [
        f"{statistics.mean(shares):.1f} ± {spread:.1f}",
        f"{_mean(found, 'nodes'):.0f}",
        f"{_mean(found, 'kernels'):.0f}",
        f"{_mean(found, 'log_paths'):.1f}",
        f"{_mean(found, 'seconds'):.1f}",
    ]


def table() -> None:
    """The page: accuracy first, the best above, then what the graph says."""
    every = rows()
    lines = [
        "# Methods on handwritten digits",
        "",
        "Made by `python benchmarks/methods.py`; do not edit.",
        "",
    ]
    lines += [
        "scikit-learn's digits (1437 of 8 x 8 pixels to train on, 360 held out), three seeds. Means;",
        "accuracy in per cent with its deviation; natural logarithm of paths, at spatial resolution; seconds",
        "of one thread, capture and all. Budgets are the methods' own: global, or ERK for `dpai`, `npb`,",
        "`balance` and where it says so.",
        "",
        "![accuracy against density](methods.svg)",
        "",
    ]
    for network in NETWORKS:
        dense = [row for row in every if row["network"] == network and row["method"] == "dense"]
        lines += [f"## {network}", "", f"Dense: {100 * _mean(dense, 'accuracy'):.1f} %.", ""]
        for sparsity in SPARSITIES:
            found = {
                entry: [
                    row for row in every
                    if (row["network"], row["method"], row["sparsity"]) == (network, entry, sparsity)
                ]
                for entry in ENTRIES
            }  # fmt: skip
            found = {entry: some for entry, some in found.items() if some}
            lines += [f"### {100 * sparsity:g} % removed", ""]
            lines += [
                "| method | accuracy | nodes | kernels | ln paths | seconds |",
                "| --- | ---: | ---: | ---: | ---: | ---: |",
            ]
            for entry in sorted(found, key=lambda name: -_mean(found[name], "accuracy")):
                lines.append(f"| {entry} | {' | '.join(_cells(found[entry]))} |")
            lines.append("")
    if NOTES.exists():
        lines.append(NOTES.read_text().rstrip())
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    plot(every)


def plot(every: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    marks = "os^vDP*X"
    for axes, network in zip(figure.subplots(1, 2), NETWORKS, strict=True):
        for i, entry in enumerate(ENTRIES):
            points = []
            for sparsity in SPARSITIES:
                found = [
                    row["accuracy"] for row in every
                    if (row["network"], row["method"], row["sparsity"]) == (network, entry, sparsity)
                ]  # fmt: skip
                if found:
                    points.append((100 * (1 - sparsity), 100 * statistics.mean(found)))
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker=marks[i % len(marks)], label=entry, lw=1, ms=4,
                    color=colormaps["tab20"](i % 20),
                )  # fmt: skip
        axes.set(title=network, xlabel="density, %", ylabel="accuracy, %", xscale="log")
        axes.set_xticks([0.5, 2, 10], ["0.5", "2", "10"])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(PLOT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--network", choices=tuple(NETWORKS))
    arguments = parser.parse_args()
    run(arguments.network) if arguments.what == "run" else table()
