"""Step a pruner in a loop of Accelerate: an ``Accelerator`` comes in, its checkpoints hold the pruner too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from fxprune.training.pruner import Pruner

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("the steps need Accelerate: pip install 'fxprune[transformers]'") from error


class PruningSteps:
    """Calls ``pruner.step`` after optimiser steps or epochs, and is saved by ``accelerator.save_state``.

    Args:
        accelerator: of the loop; its gradient accumulation is respected.
        pruner: made of the model with ``returns="inplace"``, before ``accelerator.prepare``.
        every: "step", for :meth:`step`, or "epoch", for :meth:`epoch`; the unit of the pruner's ``total``.
        loss: for "rigl": the loss of a batch of your choice, called when an update is due.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pruner: Pruner,
        *,
        every: Literal["epoch", "step"] = "epoch",
        loss: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        if every not in ("epoch", "step"):
            raise ValueError(f"every={every!r}: expected 'epoch' or 'step'")
        self.accelerator, self.pruner, self.every, self.loss = accelerator, pruner, every, loss
        self.done = 0
        accelerator.register_for_checkpointing(self)

    def step(self) -> None:
        """Call it after ``optimizer.step()``; batches whose gradients only accumulate do not count."""
        if self.every == "step" and self.accelerator.sync_gradients:
            self.done += 1
            self.pruner.step(self.done, self.loss)

    def epoch(self) -> None:
        """Call it after an epoch."""
        if self.every == "epoch":
            self.done += 1
            self.pruner.step(self.done, self.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"pruner": self.pruner.state_dict(), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])
        self.done = int(state["done"])
