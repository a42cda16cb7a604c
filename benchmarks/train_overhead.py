"""A training step of a masked model over one of the dense model, eager and compiled. Run by hand.

Steps of the two are taken in turns, so that whatever else the machine does falls on both; the ratio is that
of the medians, and beside it the median of the ratios of neighbouring steps. Targets: 1.08 eager, 1.02
compiled.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import timm
import torch
import typer
from torch import nn
from torch.nn import functional as F

import fxprune

MODELS = "resnet50,vit_small_patch16_224"


def step_of(model: nn.Module, batch: int, size: int, device: str) -> Callable[[], None]:
    """A function that takes one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.arange(batch, device=device) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Time a step, to the end of what it has started."""
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    models: str = MODELS,
    batch: int = 16,
    size: int = 224,
    steps: int = 10,
    warmup: int = 3,
    device: str = "cpu",
    sparsity: float = 0.9,
    modes: str = "eager,compiled",
) -> None:
    """Times each model in each mode."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, batch {batch}, {size} px")
    print(f"{'model':24} {'mode':9} {'dense s':>9} {'masked s':>9} {'ratio':>7} {'paired':>7}")
    for name in models.split(","):
        for mode in modes.split(","):
            torch._dynamo.reset()
            torch.manual_seed(0)
            dense = timm.create_model(name, num_classes=10).to(device).train()
            example = torch.ones(2, 3, size, size)
            pruner = fxprune.Pruner(dense.cpu(), "gmp", sparsity, total=1, example_inputs=example)
            pruner.step(1)
            pair = [dense.to(device), pruner.model.to(device).train()]
            if mode == "compiled":
                pair = [torch.compile(model) for model in pair]
            plain, masked = (step_of(model, batch, size, device) for model in pair)
            for _ in range(warmup):
                plain()
                masked()
            times = [(seconds(plain, device), seconds(masked, device)) for _ in range(steps)]
            first, second = (median(column) for column in zip(*times, strict=True))
            paired = median(b / a for a, b in times)
            print(
                f"{name:24} {mode:9} {first:9.4f} {second:9.4f} {second / first:7.3f} {paired:7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
