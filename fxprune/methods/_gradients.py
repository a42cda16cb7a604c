"""Gradients of the training loss at given weights, leaving the model as it was.

Effective weights and batches come in; losses and their mean gradients go out. The weights are swapped in for
the duration of a call (``torch.func.functional_call``), buffers are copies, modes are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from fxprune.methods._contract import Problem
from fxprune.methods._data import Batch, seeded
from fxprune.sparsity.masks import Masks

Mode = Literal["train", "eval"]


def masked(problem: Problem, masks: Masks) -> dict[str, torch.Tensor]:
    """The effective weights ``w * m``, fresh leaves that a gradient can be asked for."""
    return {name: (weight * masks[name]).requires_grad_() for name, weight in problem.weights.items()}


@contextmanager
def scoring(problem: Problem, mode: Mode) -> Iterator[None]:
    """The model in ``mode``, gradients on, randomness (dropout) under the problem's seed; put back after."""
    modes = {module: module.training for module in problem.model.modules()}
    try:
        with torch.inference_mode(False), torch.enable_grad(), seeded(problem):
            problem.model.train(mode == "train")
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def loss_at(problem: Problem, weights: Mapping[str, torch.Tensor], batch: Batch, method: str) -> torch.Tensor:
    """The loss of ``batch`` with ``weights`` in place: a scalar that can be differentiated.

    Raises ``ValueError`` for a loss that is no finite scalar or does not depend on the model, and for labels
    that do not fit the output; ``TypeError`` where the default loss has no tensor to work on.
    """
    objective = _Objective(problem.model, problem.loss_fn, method)
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    state = {f"model.{name}": tensor for name, tensor in (buffers | dict(weights)).items()}
    loss = torch.func.functional_call(objective, state, (batch,))
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"method {method!r}: loss_fn returned {_describe(loss)}, expected a scalar tensor")
    if not loss.requires_grad:
        raise ValueError(
            f"method {method!r}: the loss does not depend on the model's weights; was it detached?"
        )
    if not math.isfinite(float(loss.detach())):
        raise ValueError(f"method {method!r}: the loss is {float(loss.detach())}; scores need a finite one")
    return loss.reshape(())


def loss_gradients(
    problem: Problem, weights: Mapping[str, torch.Tensor], batch: Batch, method: str
) -> dict[str, torch.Tensor]:
    """d loss / d weights for one batch; zeros for weights that the loss does not depend on."""
    loss = loss_at(problem, weights, batch, method)
    found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def mean_gradients(
    problem: Problem, weights: Mapping[str, torch.Tensor], some: Sequence[Batch], method: str
) -> dict[str, torch.Tensor]:
    """The mean over batches of ``loss_gradients``."""
    first, *others = some
    total = loss_gradients(problem, weights, first, method)
    for batch in others:
        for name, gradient in loss_gradients(problem, weights, batch, method).items():
            total[name] = total[name] + gradient  # not in place: gradients may share storage
    return {name: gradient / len(some) for name, gradient in total.items()} if others else total


class _Objective(torch.nn.Module):
    """The model and its loss as one module, so that the loss sees the weights that are swapped in."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable[..., Any] | None, method: str) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.method = method

    def forward(self, batch: Batch) -> Any:
        if batch.mapping:
            if self.loss_fn is None:
                raise ValueError(
                    f"method {self.method!r}: mapping batches need loss_fn=..., of (model, batch)"
                )
            return self.loss_fn(self.model, batch.inputs)
        output = _run(self.model, batch.inputs)
        if self.loss_fn is not None:
            return self.loss_fn(output, batch.target)
        return classification_loss(output, batch.target, self.method)


def _run(model: torch.nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def classification_loss(output: Any, target: Any, method: str) -> torch.Tensor:
    """Mean cross entropy of logits (N, C, ...) and labels (N, ...), or probabilities of the logits' shape.

    Raises ``TypeError`` where there are no such tensors, ``ValueError`` for shapes or labels that do not fit.
    """
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        raise TypeError(
            f"method {method!r}: the model returns {_describe(output)}, the target is {_describe(target)}; "
            "cross entropy needs two tensors, pass loss_fn=... for anything else"
        )
    if target.is_floating_point():
        if target.shape != output.shape:
            raise ValueError(_misfit(method, output, target))
        return cross_entropy(output, target)
    if output.dim() < 2 or target.shape != output.shape[:1] + output.shape[2:]:
        raise ValueError(_misfit(method, output, target))
    labels = target.long()
    counted = labels[labels != -100]  # the label that cross entropy ignores
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= output.shape[1]:
        raise ValueError(
            f"method {method!r}: labels from {low} to {high}, but the model has {output.shape[1]} outputs"
        )
    return cross_entropy(output, labels)


def _misfit(method: str, output: torch.Tensor, target: torch.Tensor) -> str:
    return (
        f"method {method!r}: targets of shape {tuple(target.shape)} do not fit outputs of shape "
        f"{tuple(output.shape)}; pass labels (N, ...) for outputs (N, C, ...), or loss_fn=..."
    )


def _describe(value: object) -> str:
    return (
        f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    )
