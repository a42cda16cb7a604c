"""Training loops that can be killed, and say when they have done a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.training import Pruner
from training import nets

EPOCHS, ROUNDS = 6, 2


def data(order: torch.Generator) -> Any:
    x, y = nets.batch(0, 64)
    return DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=order)


def parts(model: torch.nn.Module) -> dict[str, Any]:
    """An optimiser with state, a scheduler, and the order of the data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return {"optimizer": optimizer, "scheduler": scheduler, "order": torch.Generator().manual_seed(3)}


def epoch(model: torch.nn.Module, with_: dict[str, Any]) -> None:
    for x, y in data(with_["order"]):
        noisy = x + 0.1 * torch.randn_like(x)  # the global generator counts too
        with_["optimizer"].zero_grad()
        torch.nn.functional.cross_entropy(model(noisy), y).backward()
        with_["optimizer"].step()
    with_["scheduler"].step()


def asni(folder: Path | None, say: Any = lambda text: None) -> str:
    torch.manual_seed(0)
    pruner = Pruner(
        nets.mlp(), "asni", total=EPOCHS, alpha=0.8, gamma=1.0, example_inputs=nets.X, checkpoint_dir=folder
    )
    with_ = parts(pruner.model)
    for at in range(pruner.resume(**with_) + 1, EPOCHS + 1):
        epoch(pruner.model, with_)
        pruner.step(at)
        say(f"asni {at}")
    return nets.digest(pruner.model) + nets.digest(pruner.reinitialize("original"))


def imp(folder: Path | None, say: Any = lambda text: None) -> str:
    def train(model: torch.nn.Module, run: Any) -> float:
        with_ = parts(model)
        for at in range(run.attach(**with_) + 1, 5):
            epoch(model, with_)
            run.step(at)
            say(f"imp {run.round} {at}")
        return float(next(model.parameters()).detach().sum())

    torch.manual_seed(0)
    found = fxprune.lottery(
        nets.mlp,
        train,
        ROUNDS,
        0.5,
        rewind_to=2,
        example_inputs=nets.X,
        checkpoint_dir=folder,
        progress=False,
    )
    return nets.digest(found.model) + repr(found.results) + repr(found.sparsities)


LOOPS = {"asni": asni, "imp": imp}


def in_a_process(kind: str, folder: Path, pipe: Any) -> None:
    """Run in a process that is to be killed; it says what it has done through ``pipe``."""
    torch.set_num_threads(1)
    pipe.send(LOOPS[kind](folder, pipe.send))
