"""Define a training method: a moment of a training run comes in, the masks from then on go out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fxprune.methods import Method, Problem, resolve
from fxprune.sparsity.budget import Budget, count
from fxprune.sparsity.masks import Masks, is_subset, kept

Grown = Literal["zero", "dense"]
"""Where a weight that comes back starts: from zero, or from the value it had when it was pruned."""


@dataclass(frozen=True)
class Moment:
    """Hold what a method sees when an update is due.

    ``at``: the step or epoch of the update, as the method's ``due`` said. ``start``: weights in each
    parameter when training began. ``final``: the budget that is reached in the end. ``problem``: the question
    for a pruning method, within the masks of now. ``gradients``: asks the training loop for the derivative of
    the loss with respect to every prunable weight, pruned ones included. ``whole``: the prunable weights of
    the network that training began with; 0 for those of ``final``. ``shrunk``: what that network cost, over
    what this one costs without masks, in the unit of the granularity.
    """

    at: int
    start: dict[str, int]
    final: Budget
    problem: Problem
    gradients: Callable[[], dict[str, torch.Tensor]]
    whole: int = 0
    shrunk: float = 1.0

    @property
    def masks(self) -> Masks:
        """The masks of now."""
        return self.problem.masks

    def budget(self, density: float) -> Budget:
        """The exact budget at ``density`` of all prunable weights; no more than there are now.

        Where layers have budgets of their own, each is as far on its way as the whole is.
        """
        final, present = self.final, kept(self.masks)
        whole = self.whole or sum(final.sizes.values())
        if final.layers is None:
            budget = Budget(count(whole, density), final.sizes, asked=density * self.shrunk)
        else:
            target = final.total / whole
            progress = 1.0 if target == 1 else (1 - density) / (1 - target)
            budget = final.towards(lambda target: 1 - min(progress, 1.0) * (1 - target), self.start)
        return budget.capped(present).capped(self.problem.granularity.room(self.masks))


@dataclass(frozen=True)
class TrainingMethod:
    """A method that changes masks while a network trains.

    ``target``: the sparsity it ends at. ``due``: the update that ``step(at)`` stands for (the last one at or
    before ``at``), or None before the first. ``update``: the masks from then on. ``begin``: the masks that
    training starts with, None for those the model has. ``budget``: the usual allocation over layers.
    ``grown``: where weights that come back start. ``needs``: ``{"gradients"}`` where ``step`` must be given a
    loss; ``{"data"}`` where the criterion looks at data.
    """

    name: str
    target: float
    due: Callable[[int], int | None]
    update: Callable[[Moment], Masks]
    begin: Callable[[Moment], Masks] | None = None
    budget: str = "global"
    grown: Grown = "zero"
    needs: frozenset[str] = frozenset()
    summary: str = ""
    paper: str = ""

    @property
    def regrows(self) -> bool:
        """Whether weights that are gone may come back."""
        return self.begin is not None or self.grown == "dense"


def resolve_criterion(criterion: str | Method) -> Method:
    """Return the method that says which weights go; ``ValueError`` for one that returns new weights."""
    chosen = resolve(criterion)
    if chosen.updates:
        raise ValueError(
            f"criterion {chosen.name!r} returns new weights, which training would overwrite; take it as the "
            "method of fxprune.apply"
        )
    return chosen


def shrink(moment: Moment, density: float, criterion: Method) -> Masks:
    """The masks that ``criterion`` leaves at ``density`` of all prunable weights; no pruned one returns.

    Raises ``ValueError`` for a criterion that keeps what was pruned before, or that returns new weights.
    """
    masks = criterion.masks(replace(moment.problem, budget=moment.budget(density)))
    if not is_subset(masks, moment.masks):
        raise ValueError(f"criterion {criterion.name!r} keeps weights that were pruned before")
    return masks
