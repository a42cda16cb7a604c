"""A fastai ``Callback`` that steps a pruner: a ``Learner`` comes in with its loop, masks follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from fxprune.training.pruner import Pruner

try:
    from fastai.callback.core import Callback
except ImportError as error:
    raise ImportError("the callback needs fastai: pip install fastai") from error


class PruningCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Calls ``pruner.step`` after every epoch or optimiser step of a ``Learner``.

    Args:
        pruner: made of ``learn.model`` with ``returns="inplace"``.
        every: "epoch" or "step", the unit of the pruner's ``total``.
        loss: for "rigl": ``loss(learn)``, the loss of a batch of your choice; called when an update is due.

    Several calls of ``fit`` count on: a pruner of 6 epochs is done after ``fit(2)`` and ``fit(4)``.
    """

    def __init__(
        self,
        pruner: Pruner,
        *,
        every: Literal["epoch", "step"] = "epoch",
        loss: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        if every not in ("epoch", "step"):
            raise ValueError(f"every={every!r}: expected 'epoch' or 'step'")
        super().__init__()
        self.pruner, self.every, self.loss_of = pruner, every, loss
        self.done = 0

    def after_step(self) -> None:
        """Step after an optimiser step."""
        if self.every == "step":
            self._step()

    def after_train(self) -> None:
        """Step after the training of an epoch, before it is validated."""
        if self.every == "epoch":
            self._step()

    def _step(self) -> None:
        loss, learn = self.loss_of, self.learn
        self.done += 1
        self.pruner.step(self.done, None if loss is None else lambda: loss(learn))
