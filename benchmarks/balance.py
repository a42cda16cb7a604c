"""Balance against DPaI: ResNet-20 at 865 weights, ERK, over the paper's grid of alpha and beta.

    python benchmarks/balance.py run balance.jsonl --seeds 1
    python benchmarks/balance.py table balance.jsonl
    python benchmarks/balance.py larger larger.jsonl       # ResNet-18 and VGG-19, 99 %
    python benchmarks/balance.py plot balance.jsonl docs/balance.svg

Figures are effective nodes, effective kernels and ln paths at spatial resolution with average pooling as a
sum; seconds are of one thread, capture and all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune import zoo

ALPHAS, BETAS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0), (0.0, 0.1, 0.5, 0.8, 0.9, 1.0)
GRID = [(alpha, beta) for alpha in ALPHAS for beta in BETAS if alpha or not beta]  # alpha = 0: no beta
OWN = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]  # paths alone, nodes alone, kernels alone
SPARSITY = 1 - 865 / 270896
NETS = {
    "resnet20": (zoo.resnet20, 32),
    "resnet18_tiny": (zoo.resnet18_tiny, 64),
    "vgg19_bn": (zoo.vgg19_bn, 32),
}
LARGER = ("resnet18_tiny", "vgg19_bn")
COLUMNS = ("nodes", "kernels", "log_paths")


def measure(
    method: str, alpha: float, beta: float, seed: int, net: str = "resnet20", sparsity: float = SPARSITY
) -> dict[str, Any]:
    """One mask and its figures."""
    options = {"tol": 0.0} if method == "dpai" else {}
    make, size = NETS[net]
    image = torch.ones(1, 3, size, size)
    start = time.process_time()
    pruned = fxprune.apply(
        make(),
        method,
        sparsity,
        example_inputs=image,
        budget="erk",
        alpha=alpha,
        beta=beta,
        seed=seed,
        progress=False,
        **options,
    )
    seconds = time.process_time() - start
    report = fxprune.analyze(pruned, "spatial", example_inputs=image)
    return {
        "method": method,
        "alpha": alpha,
        "beta": beta,
        "seed": seed,
        "nodes": report.effective_nodes,
        "kernels": report.effective_kernels,
        "log_paths": round(report.log_paths, 3),
        "seconds": round(seconds, 2),
    }


def run(path: Path, seeds: int, methods: list[str], cells: list[tuple[float, float]]) -> None:
    """Appends one line per mask that the file does not have yet."""
    torch.set_num_threads(1)
    done = {(r["method"], r["alpha"], r["beta"], r["seed"]) for r in rows(path)}
    with path.open("a") as file:
        for seed in range(seeds):
            for alpha, beta in cells:
                for method in methods:
                    if (method, alpha, beta, seed) not in done:
                        print(json.dumps(measure(method, alpha, beta, seed)), file=file, flush=True)


def larger(path: Path) -> None:
    """Both methods on larger networks, one seed, written down and shown."""
    torch.set_num_threads(1)
    with path.open("w") as file:
        for net in LARGER:
            for alpha, beta in (*OWN, (0.99, 0.5)):
                for method in ("dpai", "balance"):
                    row = {"net": net, **measure(method, alpha, beta, 0, net, 0.99)}
                    print(json.dumps(row), file=file, flush=True)
                    print(*(row[name] for name in ("net", "method", "alpha", "beta", *COLUMNS, "seconds")))


def rows(path: Path) -> list[dict[str, Any]]:
    """All lines of the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def medians(path: Path) -> dict[tuple[str, float, float], dict[str, float]]:
    """Medians over seeds, by method, alpha and beta."""
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in rows(path):
        groups.setdefault((row["method"], row["alpha"], row["beta"]), []).append(row)
    names = (*COLUMNS, "seconds")
    return {
        key: {name: statistics.median(row[name] for row in group) for name in names} | {"of": len(group)}
        for key, group in groups.items()
    }


def table(path: Path) -> None:
    """Both methods side by side."""
    found = medians(path)
    print("| alpha | beta | DPaI: nodes, kernels, ln paths | balance: nodes, kernels, ln paths | seeds |")
    print("|---|---|---|---|---|")
    for alpha, beta in GRID:
        ours, theirs = found.get(("balance", alpha, beta)), found.get(("dpai", alpha, beta))
        if ours and theirs:
            words = [
                ", ".join(f"{x[name]:.2f}" if name == "log_paths" else f"{x[name]:.0f}" for name in COLUMNS)
                for x in (theirs, ours)
            ]
            print(f"| {alpha} | {beta} | {words[0]} | {words[1]} | {theirs['of']}, {ours['of']} |")
    for method in ("dpai", "balance"):
        spent = [x["seconds"] for (name, *_), x in found.items() if name == method]
        print(f"\n{method}: {statistics.median(spent):.1f} s (median)")


def plot(path: Path, target: Path) -> None:
    """ln paths against nodes and against kernels, for every cell of the grid."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = medians(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for method, marker, colour in (("dpai", "o", "tab:gray"), ("balance", "^", "tab:blue")):
        points = [x for (name, *_), x in found.items() if name == method]
        for axis, column in zip(axes, ("nodes", "kernels"), strict=True):
            axis.scatter(
                [p[column] for p in points],
                [p["log_paths"] for p in points],
                s=18,
                c=colour,
                marker=marker,
                label=method,
            )
            axis.set_xlabel(f"effective {column}")
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("ln effective paths")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "plot", "larger"))
    parser.add_argument("path", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path("docs/balance.svg"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["dpai", "balance"])
    parser.add_argument("--own", action="store_true", help="only the three pure objectives")
    given = parser.parse_args()
    if given.what == "run":
        run(given.path, given.seeds, given.methods, OWN if given.own else GRID)
    elif given.what == "larger":
        larger(given.path)
    elif given.what == "table":
        table(given.path)
    else:
        plot(given.path, given.target)


if __name__ == "__main__":
    main()
