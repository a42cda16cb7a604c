"""Seconds from a model to its graph, and to a pruned copy. Run by hand; prints a table."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import typer

import fxprune

MODELS = ["resnet50", "vit_base_patch16_224", "tf_efficientnet_b4", "swin_base_patch4_window7_224"]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``work`` returns, and how long it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main(
    prune: bool = False, method: str = "synflow", sparsity: float = 0.9, models: str = ",".join(MODELS)
) -> None:
    """Times capture and lowering of each model; with --prune also the method and the report."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'model':32} {'capture':>8} {'lower':>8} {'analyze':>8} {method if prune else '':>8}")
    for name in models.split(","):
        model = timm.create_model(name).eval()
        gm, capturing = timed(lambda model=model: fxprune.capture(model))
        graph, lowering = timed(lambda gm=gm: fxprune.lower(gm))
        _, analysing = timed(lambda gm=gm: fxprune.analyze(gm))
        line = f"{name:32} {capturing:8.2f} {lowering:8.2f} {analysing:8.2f}"
        if prune:
            _, pruning = timed(lambda model=model: fxprune.apply(model, method, sparsity, progress=False))
            line += f" {pruning:8.1f}"
        print(f"{line}  {len(graph.kernels)} layers, {len(graph.opaque)} opaque", flush=True)


if __name__ == "__main__":
    typer.run(main)
