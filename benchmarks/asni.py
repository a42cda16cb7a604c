"""ASNI's four networks on handwritten digits, beside the paper's rows for MNIST. Run by hand; prints a table.

D: dense; A: pruned while it trains; C: A's masks from its centroids; S: A's masks from A's first weights. The
digits are scikit-learn's 1797 of 8 x 8 pixels, 360 of them held out: small beside MNIST, in images, in pixels
and in steps of training, so that the ordering can be compared, not the numbers.
"""

import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import typer

from fxprune import zoo
from fxprune.cli.experiment import TrainingRecipe, compare
from fxprune.data import digits

# Network, images' channels, recipe, ASNI's options (the paper's for the first two), and the paper's row.
SETTINGS: dict[str, tuple[Any, int, TrainingRecipe, dict[str, Any], str]] = {
    "LeNet-300-100": (
        lambda: zoo.lenet_300_100(inputs=64), 1, TrainingRecipe(50, 20, 1.2e-3),
        {"alpha": 0.98, "gamma": 5.0, "hold": 2}, "MNIST FC, 96.87 %: D 96.88, A 96.72, C 96.93, S 96.75",
    ),
    "Conv-2": (
        lambda: zoo.conv2(size=8), 1, TrainingRecipe(20, 20, 2e-4),
        {"alpha": 0.992, "gamma": 2.0, "hold": 2},
        "MNIST Conv2, 97.40 %: D 98.09, A 98.12, C 98.14, S 98.03",
    ),
    "resnet20": (
        zoo.resnet20, 3, TrainingRecipe(30, 60, 0.05, 5e-4, "sgd", "cosine"),
        {"alpha": 0.97, "gamma": 3.0, "hold": 2},
        "CIFAR-10 ResNet-18, 96 %: D 88.24, A 87.78, C 87.32, S 87.15",
    ),
}  # fmt: skip


def one(name: str, seed: int, device: str, epochs: int | None) -> dict[str, float]:
    """Accuracies of the four in percent, and the sparsity of three of them."""
    build, channels, recipe, options, _ = SETTINGS[name]
    if epochs is not None:
        recipe = TrainingRecipe(**{**vars(recipe), "epochs": epochs})
        options = {**options, "gamma": epochs / 10}

    def make() -> torch.nn.Module:
        torch.manual_seed(seed)
        network: torch.nn.Module = build()
        return network

    found = compare(make, *digits(channels=channels), recipe, seed=seed, device=device, **options)
    return {**{k: 100 * v for k, v in found.accuracies.items()}, "sparsity": 100 * found.sparsity}


def main(
    networks: str = ",".join(SETTINGS),
    seeds: int = 3,
    device: str = "cpu",
    epochs: int | None = None,
    out: Path | None = None,
) -> None:
    """Trains every network with every seed; --epochs shortens the runs, --out keeps the numbers as JSON."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, {seeds} seeds")
    print(f"{'network':14} {'sparsity':>9}  {'D':>13} {'A':>13} {'C':>13} {'S':>13}  seconds")
    for name in networks.split(","):
        start = time.perf_counter()
        rows = [one(name, seed, device, epochs) for seed in range(seeds)]
        cells = []
        for variant in "DACS":
            values = [row[variant] for row in rows]
            cells.append(f"{mean(values):6.2f} ± {stdev(values) if seeds > 1 else 0:4.2f}")
        sparsity = mean(row["sparsity"] for row in rows)
        print(f"{name:14} {sparsity:8.2f}%  {' '.join(cells)}  {time.perf_counter() - start:7.0f}")
        print(f"{'':14} paper: {SETTINGS[name][4]}", flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                for seed, row in enumerate(rows):
                    file.write(json.dumps({"network": name, "seed": seed, **row}) + "\n")


if __name__ == "__main__":
    typer.run(main)
