"""Prune a small network to 90 % while a plain PyTorch loop trains it on handwritten digits.

Run it with ``uv run python examples/plain_loop.py``; it takes a few seconds. Kill it, start it again with the
same ``--checkpoint-dir``, and it ends as it would have.
"""

import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fxprune
from fxprune.data import digits


def main(method: str = "gmp", epochs: int = 20, checkpoint_dir: str | None = None) -> None:
    """Trains, prunes after every epoch, and says how well it went."""
    torch.manual_seed(0)
    train, test = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    options = {"frequency": 1} if method in ("set", "rigl") else {}
    pruner = fxprune.Pruner(
        network, method, 0.9, total=epochs, example_inputs=train[0][0][None],
        checkpoint_dir=checkpoint_dir, **options,
    )  # fmt: skip
    model = pruner.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(train, 64, shuffle=True, generator=order)

    for epoch in range(pruner.resume(optimizer=optimizer, order=order) + 1, epochs + 1):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        # The loss is for RigL, which asks for the gradients of weights that are not there.
        pruner.step(epoch, lambda x=x, y=y: F.cross_entropy(model(x), y))
        model.eval()
        with torch.no_grad():
            x, y = test.tensors
            accuracy = float((model(x).argmax(1) == y).float().mean())
        print(f"epoch {epoch}: sparsity {pruner.sparsity:.1%}, accuracy {accuracy:.1%}")
    fxprune.verify(model)


if __name__ == "__main__":
    typer.run(main)
