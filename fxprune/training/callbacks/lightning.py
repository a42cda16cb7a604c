"""A Lightning ``Callback`` that steps a pruner: a ``Trainer`` comes in with its loop, masks follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from fxprune.training.pruner import Pruner

try:
    from lightning import LightningModule, Trainer
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError("the callback needs Lightning: pip install 'fxprune[lightning]'") from error


class PruningCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Calls ``pruner.step`` after every epoch or optimiser step, logs ``sparsity``, is saved with the rest.

    Args:
        pruner: made of the ``LightningModule`` or a part of it, with ``returns="inplace"``, or with its
            ``model`` put into the module before the optimiser is made.
        every: "epoch" or "step", the unit of the pruner's ``total``.
        loss: for "rigl": ``loss(module, batch)``, the loss of a batch; called when an update is due. With
            "epoch" it is given the epoch's last batch.

    Lightning's checkpoints hold weights, masks and the pruner's state: ``ckpt_path=`` goes on with them.
    """

    def __init__(
        self,
        pruner: Pruner,
        *,
        every: Literal["epoch", "step"] = "epoch",
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
    ) -> None:
        if every not in ("epoch", "step"):
            raise ValueError(f"every={every!r}: expected 'epoch' or 'step'")
        self.pruner = pruner
        self.every = every
        self.loss = loss
        self._batch: Any = None
        self._steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps after an optimiser step; batches whose gradients only accumulate do not count."""
        self._batch = batch
        if self.every == "step" and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._step(pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps after an epoch."""
        if self.every == "epoch":
            self._step(pl_module, trainer.current_epoch + 1)
        pl_module.log("sparsity", self.pruner.sparsity)

    def _step(self, module: LightningModule, at: int) -> None:
        loss, batch = self.loss, self._batch
        self.pruner.step(at, None if loss is None else lambda: loss(module, batch))

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"pruner": self.pruner.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self.pruner.load_state_dict(state_dict["pruner"])
        self._steps = state_dict["steps"]
