"""Prune a ResNet-18 to 90 % with SynFlow, compile it, and train it for two epochs on handwritten digits.

Run it with ``uv run python examples/quickstart.py``; it takes a few minutes on two cores.
"""

import time

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune

SIZE, EPOCHS, BATCH = 32, 2, 32


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1797 images of 8 x 8 pixels, upscaled; the last 360 are for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    return TensorDataset(images[:-360], labels[:-360]), TensorDataset(images[-360:], labels[-360:])


def compiled(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The model under ``torch.compile``, or as it is where there is no C++ compiler."""
    try:
        fast = torch.compile(model)
        fast(example).sum().backward()
    except RuntimeError as error:
        print(f"not compiled: {str(error).splitlines()[0]}")
        return model
    finally:
        model.zero_grad()
    return fast


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Fraction of the test images that are recognised."""
    images, labels = test.tensors
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """The whole story."""
    torch.manual_seed(0)
    train, test = digits()
    model = timm.create_model("resnet18", num_classes=10, in_chans=1)

    start = time.perf_counter()
    pruned = fxprune.apply(model, "synflow", 0.9, example_inputs=torch.ones(2, 1, SIZE, SIZE))
    print(fxprune.analyze(pruned))
    print(f"pruned in {time.perf_counter() - start:.0f} s")

    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * len(loader))
    fast = compiled(pruned, next(iter(loader))[0])
    for epoch in range(EPOCHS):
        fast.train()
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(fast(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, accuracy {accuracy(pruned, test):.1%}")

    fxprune.verify(pruned)
    print(f"still {fxprune.analyze(pruned).sparsity:.1%} sparse after training")


if __name__ == "__main__":
    main()
