"""Prune a timm model in the shape of timm's own training script: ``train_one_epoch`` and ``validate``.

Three lines are new against that script; they are marked. Run it with
``uv run python examples/timm_script.py``; it takes a minute or two on two cores.
"""

from collections.abc import Iterable
from typing import Any

import timm
import torch
import typer
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader

import fxprune
from fxprune.data import digits


def train_one_epoch(
    epoch: int,
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_fn: nn.Module,
    model_ema: ModelEmaV3,
    clip_grad: float | None = 1.0,
) -> float:
    """As in timm's script: one pass over the data; returns the mean loss."""
    model.train()
    losses = AverageMeter()
    for x, y in loader:
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip_grad is not None:
            dispatch_clip_grad(model.parameters(), clip_grad)
        optimizer.step()
        model_ema.update(model)
        losses.update(loss.item(), x.size(0))
    return float(losses.avg)


@torch.no_grad()
def validate(model: nn.Module, loader: Iterable[Any]) -> float:
    """As in timm's script: top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for x, y in loader:
        top1.update(accuracy(model(x), y)[0].item(), x.size(0))
    return float(top1.avg)


def main(model: str = "resnet18", epochs: int = 4, size: int = 32, batch: int = 64) -> dict[str, float]:
    """Trains; returns the accuracies of the model and of its moving average, and the sparsity."""
    torch.manual_seed(0)
    train, test = digits(size=size, channels=3)
    network = timm.create_model(model, num_classes=10)
    pruner = fxprune.Pruner(                                                                    # new
        network, "gmp", 0.8, total=epochs, example_inputs=torch.ones(2, 3, size, size)
    )  # fmt: skip
    network = pruner.model  # new  # fmt: skip
    ema = ModelEmaV3(network, decay=0.9)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)
    loader = DataLoader(train, batch, shuffle=True, drop_last=True)
    held_out = DataLoader(test, batch)
    found = {}
    for epoch in range(epochs):
        loss = train_one_epoch(epoch, network, loader, optimizer, LabelSmoothingCrossEntropy(), ema)
        scheduler.step(epoch + 1)
        pruner.step(epoch + 1)  # new  # fmt: skip
        found = {
            "top1": validate(network, held_out), "ema": validate(ema.module, held_out),
            "sparsity": pruner.sparsity, "loss": loss,
        }  # fmt: skip
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    fxprune.verify(network)
    return found


if __name__ == "__main__":
    typer.run(main)
