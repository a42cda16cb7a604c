"""DPaI's Table 10 on ResNet-20: effective nodes, kernels and ln paths under each objective, counted exactly.

    python benchmarks/dpai_table10.py [--resolution spatial] [--seeds 5] [--out FILE]

The network has 270,896 prunable weights, of which 865 are kept, under ERK; 3000 steps of Adam. Whatever the
resolution of the search, the masks are counted at spatial resolution with average pooling as sum. A median
over seeds is what the targets ask for.
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

SPARSITY = 1 - 865 / 270_896
IMAGES = torch.ones(1, 3, 32, 32)
# alpha, beta; nodes, kernels and ln paths as printed; the masks of the authors' code, counted exactly.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "paths": {"alpha": 0.0, "beta": 0.0, "paper": (75, 211, 69.22), "code": (76, None, 58.21)},
    "nodes": {"alpha": 1.0, "beta": 0.0, "paper": (570, 740, 22.30), "code": (547, 710, 16.90)},
    "kernels": {"alpha": 1.0, "beta": 1.0, "paper": (168, 860, 47.97), "code": (182, 858, 38.04)},
    "nodes and kernels": {"alpha": 1.0, "beta": 0.5},
    "all": {"alpha": 0.99, "beta": 0.5},
}
TARGETS = {"paths": ("log_paths", 59.0), "nodes": ("nodes", 550), "kernels": ("kernels", 860)}


def measure(alpha: float, beta: float, seed: int, resolution: str, steps: int) -> dict[str, float]:
    """One mask, counted."""
    start = time.perf_counter()
    pruned = fxprune.apply(
        zoo.resnet20(), "dpai", SPARSITY, example_inputs=IMAGES, seed=seed, alpha=alpha, beta=beta,
        steps=steps, tol=0.0, resolution=resolution, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    report = fxprune.analyze(pruned)
    return {
        "seed": seed,
        "kept": report.kept_params,
        "effective": report.effective_params,
        "nodes": report.effective_nodes,
        "kernels": report.effective_kernels,
        "log_paths": report.log_paths,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resolution", choices=["channel", "spatial"], default="channel")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", choices=list(OBJECTIVES), nargs="*", default=list(OBJECTIVES))
    parser.add_argument("--out", type=Path)
    wish = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"resolution": wish.resolution, "steps": wish.steps, "objectives": {}}
    print(f"{'objective':18} {'nodes':>12} {'kernels':>12} {'ln paths':>16}   (median, all seeds)")
    for name in wish.only:
        setting = OBJECTIVES[name]
        runs = [
            measure(setting["alpha"], setting["beta"], seed, wish.resolution, wish.steps)
            for seed in range(wish.seeds)
        ]
        columns = {key: [run[key] for run in runs] for key in ("nodes", "kernels", "log_paths")}
        medians = {key: statistics.median(values) for key, values in columns.items()}
        print(
            f"{name:18} {medians['nodes']:12g} {medians['kernels']:12g} {medians['log_paths']:16.2f}   "
            f"{columns['nodes']} {columns['kernels']} {[round(value, 2) for value in columns['log_paths']]}"
        )
        for source in ("paper", "code"):
            if source in setting:
                nodes, kernels, paths = setting[source]
                print(f"  {source:16} {nodes:12} {kernels or '-':>12} {paths:16}")
        if name in TARGETS:
            column, least = TARGETS[name]
            print(f"  target: {column} >= {least}: {'met' if medians[column] >= least else 'missed'}")
        found["objectives"][name] = {"runs": runs, "medians": medians}
    if wish.out:
        wish.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
