"""Prune a network while a Lightning ``Trainer`` trains it on handwritten digits.

Run it with ``uv run python examples/lightning_callback.py``; it needs ``pip install 'fxprune[lightning]'``.
"""

from typing import Any

import lightning
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fxprune
from fxprune.data import digits
from fxprune.training.callbacks.lightning import PruningCallback


class Digits(lightning.LightningModule):
    """An ordinary LightningModule; it knows nothing of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 10) -> dict[str, float]:
    """Trains with the callback; returns the last accuracy and sparsity."""
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    module = Digits()
    pruner = fxprune.Pruner(
        module.network, "asni", total=epochs, alpha=0.9, example_inputs=train[0][0][None], returns="inplace"
    )
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[PruningCallback(pruner)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 360))
    fxprune.verify(module)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"sparsity {found['sparsity']:.1%}, accuracy {found['accuracy']:.1%}")
    return found


if __name__ == "__main__":
    typer.run(main)
