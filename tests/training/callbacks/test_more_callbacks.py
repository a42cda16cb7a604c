"""Accelerate and fastai step a pruner as a plain loop does."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X[:, :3].argmax(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def pruned_net(total: int) -> tuple[nn.Module, fxprune.Pruner]:
    model = net()
    return model, fxprune.Pruner(model, "gmp", 0.5, total=total, example_inputs=X, returns="inplace")


def plain(epochs: int) -> nn.Module:
    model, pruner = pruned_net(epochs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(1, epochs + 1):
        for x, y in DataLoader(DATA, 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruner.step(epoch)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def accelerated(folder: Path, epochs: int, stop: int, resume: bool) -> nn.Module:
    from accelerate import Accelerator

    from fxprune.training.callbacks.accelerate import PruningSteps

    model, pruner = pruned_net(epochs)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(DATA, 8))
    steps = PruningSteps(accelerator, pruner)
    if resume:
        accelerator.load_state(str(folder))
    for _ in range(steps.done, stop):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            steps.step()
        steps.epoch()
    accelerator.save_state(str(folder))
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped


def test_accelerate_is_a_plain_loop_and_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    wanted = plain(4)
    assert same(accelerated(tmp_path / "whole", 4, 4, False), wanted)
    accelerated(tmp_path / "part", 4, 2, False)
    found = accelerated(tmp_path / "part", 4, 4, True)
    assert same(found, wanted)
    fxprune.verify(found)
    assert fxprune.analyze(found, example_inputs=X).sparsity == pytest.approx(0.5, abs=0.01)


def test_accumulated_gradients_are_one_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    from fxprune.training.callbacks.accelerate import PruningSteps

    model, pruner = pruned_net(2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loader = accelerator.prepare(model, DataLoader(DATA, 8))
    steps = PruningSteps(accelerator, pruner, every="step")
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            steps.step()
    assert steps.done == 2
    with pytest.raises(ValueError, match="every='batch'"):
        PruningSteps(accelerator, pruner, every="batch")  # type: ignore[arg-type]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("every", "total"), [("epoch", 4), ("step", 16)])
def test_fastai(every: Any, total: int) -> None:
    pytest.importorskip("fastai")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    from fxprune.training.callbacks.fastai import PruningCallback

    model, pruner = pruned_net(total)

    loader = DataLoader(DATA, 8)
    learn = Learner(
        DataLoaders(loader, loader, device="cpu"), model, nn.CrossEntropyLoss(), lr=0.1,
        opt_func=partial(SGD, mom=0.0), cbs=[PruningCallback(pruner, every=every)], train_bn=True,
    )  # fmt: skip
    with learn.no_logging():
        learn.fit(1)
        learn.fit(3)
    fxprune.verify(model)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    if every == "epoch":
        wanted = plain(4)
        assert all(
            torch.allclose(a.float(), b.float(), atol=1e-6)
            for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True)
        )
