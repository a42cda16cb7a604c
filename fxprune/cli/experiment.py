"""The paper's comparison: a network and data come in; dense, pruned, and two retrained networks go out.

D is trained dense, A is pruned while it trains, C is A's masks trained from its centroids, S is A's masks
trained from A's own first weights (ASNI, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fxprune.cli.runs import SavedRun
from fxprune.training.contract import TrainingMethod
from fxprune.training.numbers import integer, positive
from fxprune.training.pruner import Pruner

VARIANTS = {
    "D": "dense",
    "A": "pruned in training",
    "C": "its masks, from centroids",
    "S": "its masks, from the start",
}


@dataclass(frozen=True)
class TrainingRecipe:
    """Hold how to train: the same for all four.

    ``optimizer``: "adam" or "sgd" (momentum 0.9). ``rates``: "constant", "cosine" (half a wave) or "quarter"
    (a quarter of one); the paper's printed formula turns negative half-way, these are its two sane readings.
    ``delta``: the larger, the higher the last rate.
    """

    epochs: int = 20
    batch: int = 60
    lr: float = 1.2e-3
    weight_decay: float = 0.0
    optimizer: str = "adam"
    rates: str = "constant"
    delta: float = 0.06

    def __post_init__(self) -> None:
        integer("epochs", self.epochs, 1)
        integer("batch", self.batch, 1)
        positive("lr", self.lr)
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: expected 'adam' or 'sgd'")
        if self.rates not in ("constant", "cosine", "quarter"):
            raise ValueError(f"rates={self.rates!r}: expected 'constant', 'cosine' or 'quarter'")

    def rate(self, epoch: int) -> float:
        """The learning rate in epoch 1..epochs; never negative.

        >>> round(TrainingRecipe(epochs=160, lr=1.0, rates="cosine").rate(160), 4)
        0.0079
        """
        turn = math.pi * epoch / ((1 + self.delta) * self.epochs)
        if self.rates == "cosine":
            return self.lr * (1 + math.cos(turn)) / 2
        return self.lr * (math.cos(turn / 2) if self.rates == "quarter" else 1.0)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimiser."""
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)


@dataclass
class Comparison:
    """Test accuracies after each epoch, by variant; the sparsity of A, C and S; A's pruner."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    sparsity: float = 0.0
    pruner: Pruner | None = None

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracy of each variant after its last epoch, a fraction."""
        return {variant: curve[-1] for variant, curve in self.curves.items()}


Note = Callable[[str, int, dict[str, float]], None]
"""``note(variant, epoch, {"loss", "accuracy", "sparsity"})`` after each epoch."""


def compare(
    make: Callable[[], nn.Module],
    train: Any,
    test: Any,
    recipe: TrainingRecipe,
    method: str | TrainingMethod = "asni",
    sparsity: float | None = None,
    *,
    variants: str = "DACS",
    seed: int = 0,
    device: str | torch.device = "cpu",
    note: Note = lambda variant, epoch, numbers: None,
    saved: SavedRun | None = None,
    **method_options: Any,
) -> Comparison:
    """Trains the four networks and measures them.

    Args:
        make: returns the network, the same each time.
        train, test: data sets of (x, y).
        recipe: how to train.
        method, sparsity, method_options: as for :class:`Pruner`, whose steps are epochs.
        variants: which of D, A, C, S; C and S come with A.
        seed: of the order of the data and of all random numbers in training.
        device: where to train.
        note: called after every epoch.
        saved: the folder that the run is kept in; it goes on where it was. Epochs beyond those that it was
            begun with train under the masks and at the rate of its last.

    Raises ``ValueError`` for unknown variants, and what :class:`Pruner` raises.
    """
    _check_variants(variants)
    found = Comparison()
    scheduled = recipe.epochs if saved is None else saved.scheduled

    def run(variant: str, model: nn.Module, pruner: Pruner | None = None) -> None:
        def noted(epoch: int, numbers: dict[str, float]) -> None:
            pruned = None if variant == "D" else found.pruner
            note(variant, epoch, {**numbers, "sparsity": 0.0 if pruned is None else pruned.sparsity})

        loop = _Loop(variant, recipe, scheduled, seed, pruner, saved)
        found.curves[variant] = loop.train(model.to(device), train, test, noted)

    if set(variants) & set("ACS"):
        options = {"total": scheduled, "example_inputs": train[0][0][None], "seed": seed, **method_options}
        found.pruner = Pruner(make(), method, sparsity, **options)
    if saved is not None:
        saved.begin()
    if "D" in variants:
        run("D", make())
    if found.pruner is not None:
        run("A", found.pruner.model, found.pruner)
        found.sparsity = found.pruner.sparsity
        centroids = {name: value.clone() for name, value in found.pruner.model.state_dict().items()}
        for variant, start in (("C", "centroids"), ("S", "original")):
            if variant in variants:
                found.pruner.model.load_state_dict(centroids)
                run(variant, found.pruner.reinitialize(start))
    return found


def _check_variants(variants: str) -> None:
    if not variants or set(variants) - set(VARIANTS):
        raise ValueError(f"variants={variants!r}: expected letters of {''.join(VARIANTS)}")


def fit(model: nn.Module, train: Any, test: Any, recipe: TrainingRecipe, seed: int) -> list[float]:
    """Train a network, dense or masked; return its accuracies on ``test`` after every epoch."""
    loop = _Loop("D", recipe, recipe.epochs, seed, None, None)
    return loop.train(model, train, test, lambda epoch, numbers: None)


@dataclass
class _Loop:
    """Train one variant, and keep its state after every epoch where the run is saved."""

    variant: str
    recipe: TrainingRecipe
    scheduled: int
    seed: int
    pruner: Pruner | None
    saved: SavedRun | None

    def train(
        self, model: nn.Module, train: Any, test: Any, note: Callable[[int, dict[str, float]], None]
    ) -> list[float]:
        """Return the accuracies after every epoch."""
        recipe, order = self.recipe, torch.Generator().manual_seed(self.seed)
        optimizer = recipe.make_optimizer(model)
        loader = DataLoader(
            train, recipe.batch, shuffle=True, generator=order, drop_last=len(train) > recipe.batch
        )
        rates = replace(recipe, epochs=self.scheduled)
        device = next(model.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            curve = self._go_on(model, optimizer, order, note)
            for epoch in range(len(curve) + 1, recipe.epochs + 1):
                for group in optimizer.param_groups:
                    group["lr"] = rates.rate(min(epoch, self.scheduled))
                model.train()
                total = 0.0
                for batch in loader:
                    x, y = (part.to(device) for part in batch)
                    optimizer.zero_grad()
                    loss = _loss(model, x, y)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += float(loss.detach())
                if self.pruner is not None and epoch <= self.scheduled:
                    self.pruner.step(epoch, partial(_loss, model, x, y))
                curve.append(accuracy(model, test))
                self._keep(model, optimizer, order, curve)
                note(epoch, {"loss": total / len(loader), "accuracy": curve[-1]})
        return curve

    def _go_on(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        order: torch.Generator,
        note: Callable[[int, dict[str, float]], None],
    ) -> list[float]:
        """Put everything into the state of the last epoch that was kept; return the accuracies until then."""
        state = None if self.saved is None else self.saved.read(self.variant)
        if state is None:
            return []
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        curve = [float(value) for value in state["curve"]]
        for epoch, value in enumerate(curve, 1):
            note(epoch, {"accuracy": value})
        return curve

    def _keep(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        order: torch.Generator,
        curve: list[float],
    ) -> None:
        if self.saved is not None:
            pruner = {} if self.pruner is None else self.pruner.state_dict()
            self.saved.write(
                self.variant,
                {
                    "curve": curve,
                    "model": dict(model.state_dict()),
                    "optimizer": optimizer.state_dict(),
                    "order": order.get_state(),
                    "random": torch.get_rng_state(),
                    "pruner": pruner,
                },
            )


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def accuracy(model: nn.Module, test: Any, batch: int = 500) -> float:
    """The fraction of a data set of (x, y) that ``model`` classifies rightly, in eval mode."""
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    right = number = 0
    for x, y in DataLoader(test, batch):
        right += int((model(x.to(device)).argmax(1) == y.to(device)).sum())
        number += len(y)
    model.train(mode)
    return right / number
