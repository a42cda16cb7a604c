"""A transformers ``TrainerCallback`` that steps a pruner: a ``Trainer``'s loop comes in, masks follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from fxprune.training import checkpoints
from fxprune.training.pruner import Pruner

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("the callback needs transformers: pip install 'fxprune[transformers]'") from error

FILE = "fxprune.ckpt"


class PruningCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Calls ``pruner.step`` after every epoch or optimiser step, and is saved with the Trainer's checkpoints.

    Args:
        pruner: made of the model with ``returns="inplace"``.
        every: "epoch" or "step", the unit of the pruner's ``total``.
        loss: for "rigl": ``loss(model)``, the loss of a batch of your choice; called when an update is due.

    ``resume_from_checkpoint`` of a folder in ``output_dir`` goes on with the masks and the pruner of then.
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
        self.pruner = pruner
        self.every = every
        self.loss = loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the pruner go on from a checkpoint where the Trainer does."""
        if state.global_step:
            path = _folder(args, state) / FILE
            if not path.is_file():
                raise ValueError(f"{path}: no pruner was saved with this checkpoint; train with the callback")
            self.pruner.load_state_dict(checkpoints.read(path))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steps after an optimiser step."""
        if self.every == "step":
            self._step(state.global_step + 1)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steps after an epoch."""
        if self.every == "epoch":
            self._step(round(state.epoch or 0))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the sparsity to what is logged."""
        if logs is not None:
            logs["sparsity"] = self.pruner.sparsity
            if state.log_history:  # the Trainer has written it there already
                state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the pruner's state beside the weights."""
        if state.is_world_process_zero:
            checkpoints.write(_folder(args, state) / FILE, self.pruner.state_dict())

    def _step(self, at: int) -> None:
        loss = self.loss
        self.pruner.step(at, None if loss is None else lambda: loss(self.pruner.model))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
