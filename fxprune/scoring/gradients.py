"""Compute the training loss and its gradients at given weights, and leave the model as it was.

Weights are put in place for one call (``torch.func.functional_call``), buffers are copies, and the modes of
modules are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, hardsigmoid, relu6
from torch.overrides import TorchFunctionMode

from fxprune.capture import evaluation_only
from fxprune.scoring.contract import Problem
from fxprune.scoring.data import Batch, pieces, seeded
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average, holding
from fxprune.scoring.shapes import FAULTS, explain_misfit
from fxprune.sparsity.masks import Masks
from fxprune.torch_private import pytree

Mode = Literal["train", "eval"]


def masked(problem: Problem, masks: Masks) -> dict[str, torch.Tensor]:
    """Return the effective weights ``w * m`` on the model's device, as leaves that can have a gradient.

    Layers of which nothing is pruned share memory with ``problem.weights``.
    """
    return {
        name: (weight if bool(masks[name].all()) else weight * masks[name])
        .to(problem.device)
        .detach()
        .requires_grad_()
        for name, weight in problem.weights.items()
    }


@contextmanager
def scoring(problem: Problem, mode: Mode) -> Iterator[None]:
    """Put the model in ``mode``, turn gradients on and seed dropout; put everything back afterwards."""
    modes = {module: module.training for module in problem.model.modules()}
    try:
        with torch.inference_mode(False), torch.enable_grad(), seeded(problem):
            problem.model.train(mode == "train")
            for guard in evaluation_only(problem.model):  # a graph of evaluation is scored as such
                guard.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Replace fused attention and hard sigmoids, which have no second derivative, by plain ones."""
    with sdpa_kernel(SDPBackend.MATH), _PlainHardSigmoid():
        yield


class _PlainHardSigmoid(TorchFunctionMode):
    """Compute ``hardsigmoid(x)`` as ``relu6(x + 3) / 6``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is hardsigmoid:
            return relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


def loss_at(
    problem: Problem,
    weights: Mapping[str, torch.Tensor],
    batch: Batch,
    method: str,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Compute the loss of ``batch`` with ``weights`` in place: a scalar that can be differentiated.

    The model's outputs are divided by ``temperature`` before the loss sees them.
    Raises ``ValueError`` for a loss that is no finite scalar or does not depend on the model, and for labels
    that do not fit the output; ``TypeError`` where the default loss has no tensor to work on.
    """
    loss = _call(_ModelWithLoss(problem.model, problem.loss_fn, method, temperature), problem, weights, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"method {method!r}: loss_fn returned {_describe(loss)}, expected a scalar tensor")
    if not loss.requires_grad:
        raise ValueError(
            f"method {method!r}: the loss does not depend on the model's weights; was it detached?"
        )
    if not math.isfinite(float(loss.detach())):
        raise ValueError(f"method {method!r}: the loss is {float(loss.detach())}; scores need a finite one")
    return loss.reshape(())


def run_at(problem: Problem, weights: Mapping[str, torch.Tensor], batch: Batch, method: str) -> Any:
    """Compute the output for ``batch`` with ``weights`` in place; for a mapping, that of ``loss_fn``."""
    if batch.mapping:
        return _call(_ModelWithLoss(problem.model, problem.loss_fn, method, 1.0), problem, weights, batch)
    return _call(_ModelWithLoss(problem.model, _output, method, 1.0), problem, weights, batch)


def _output(output: Any, target: Any) -> Any:
    return output


def _call(
    objective: torch.nn.Module, problem: Problem, weights: Mapping[str, torch.Tensor], batch: Batch
) -> Any:
    """Run the model and a loss with ``weights`` in place of its own, on copies of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    state = {f"model.{name}": tensor for name, tensor in (buffers | dict(weights)).items()}
    return torch.func.functional_call(objective, state, (batch,))


def mean_gradients(
    problem: Problem,
    weights: Mapping[str, torch.Tensor],
    some: Sequence[Batch],
    method: str,
    *,
    of: Callable[[Batch], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Compute the mean over batches of d loss / d weights.

    Args:
        problem: with a ``problem.group``, the mean is over the batches of all its processes.
        weights: to differentiate by; they are put in place of the model's.
        some: the batches; each is run in pieces of ``problem.micro_batch`` samples.
        method: for messages.
        of: a scalar of a batch that is differentiated instead of the loss.

    Returns:
        A gradient for every weight, zeros where the scalar does not depend on it, on the device of
        ``problem.weights``. Where that is not the model's device, the gradient of each layer moves as soon as
        it is computed, so that the model's device holds one of them at a time.
    """
    if problem.shards is not None:
        return _sharded_gradients(problem, weights, some, method, of)
    leaves = list(weights.values())
    with _collected_gradients(problem, weights) as found:
        for batch in some:
            for piece, share in pieces(problem, batch):
                value = loss_at(problem, weights, piece, method) if of is None else of(piece)
                if value.requires_grad:
                    torch.autograd.backward(value if share == 1 else value * share, inputs=leaves)
    for name, weight in problem.weights.items():
        if name not in found:
            found[name] = torch.zeros_like(weight)
        if len(some) > 1:
            found[name].div_(len(some))
    average((found[name] for name in weights), problem.group)
    return {name: found[name] for name in weights}


def _sharded_gradients(
    problem: Problem,
    weights: Mapping[str, torch.Tensor],
    some: Sequence[Batch],
    method: str,
    of: Callable[[Batch], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Compute ``mean_gradients`` in the sharded model itself, over the batches of all processes."""
    if of is not None:
        raise ValueError(f"method {method!r} needs second derivatives, which sharded parameters do not have")
    frozen = [name for name in weights if not problem.model.get_parameter(name).requires_grad]
    if frozen:
        raise ValueError(
            f"method {method!r}: sharded parameter {frozen[0]!r} requires no gradient; unfreeze it"
        )
    with holding(problem.model, weights) as gradients:
        for batch in some:
            for piece, share in pieces(problem, batch):
                loss = loss_at(problem, {}, piece, method)
                torch.autograd.backward(loss if share == 1 else loss * share)
        return {name: gradient / len(some) for name, gradient in gradients().items()}


def gradients_of(
    problem: Problem, masks: Masks, *, batches: int, mode: Mode, method: str
) -> dict[str, torch.Tensor]:
    """Compute the mean gradient over the first ``batches`` batches at the weights that ``masks`` keep."""
    some = read_batches(problem, batches, method)
    with scoring(problem, mode):
        return mean_gradients(problem, masked(problem, masks), some, method)


def count_of(method: str, option: str, value: int) -> int:
    """Return ``value``; raise ``ValueError`` if it is less than 1."""
    if value < 1:
        raise ValueError(f"method {method!r}: {option}={value!r}, expected an integer of at least 1")
    return value


@contextmanager
def _collected_gradients(
    problem: Problem, weights: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the gradients of backward passes in a dict, on the device of the problem's weights."""
    found: dict[str, torch.Tensor] = {}

    def mover(name: str) -> Callable[[torch.Tensor], None]:
        def move(leaf: torch.Tensor) -> None:
            assert leaf.grad is not None
            new = leaf.grad.to(problem.weights[name].device)
            found[name] = found[name].add_(new) if name in found else new
            leaf.grad = None

        return move

    with ExitStack() as hooks:
        for name, leaf in weights.items():
            leaf.grad = None
            if leaf.device != problem.weights[name].device:
                hooks.enter_context(leaf.register_post_accumulate_grad_hook(mover(name)))  # type: ignore[no-untyped-call]
        yield found
    for name, leaf in weights.items():
        if leaf.grad is not None:
            found[name], leaf.grad = leaf.grad, None


class _ModelWithLoss(torch.nn.Module):
    """Join the model and its loss to one module, so that the loss sees the weights that are put in place."""

    def __init__(
        self, model: torch.nn.Module, loss_fn: Callable[..., Any] | None, method: str, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.model = model
        self.loss_fn = loss_fn
        self.method = method

    def forward(self, batch: Batch) -> Any:
        if batch.mapping:
            if self.loss_fn is None:
                raise ValueError(
                    f"method {self.method!r}: mapping batches need loss_fn=..., of (model, batch)"
                )
            if self.temperature != 1:
                raise ValueError(
                    f"method {self.method!r}: temperature={self.temperature} cannot reach the outputs inside "
                    "loss_fn(model, batch); divide them there, and leave temperature out"
                )
            return self.loss_fn(self.model, batch.inputs)
        output = run(self.model, batch.inputs)
        if self.temperature != 1:
            output = pytree.tree_map_only(torch.Tensor, self._divide, output)
        if self.loss_fn is not None:
            return _loss_of_pair(self.loss_fn, output, batch.target, self.method)
        return classification_loss(output, batch.target, self.method)

    def _divide(self, part: torch.Tensor) -> torch.Tensor:
        return part / self.temperature if part.is_floating_point() else part


def _loss_of_pair(loss_fn: Callable[..., Any], output: Any, target: Any, method: str) -> Any:
    try:
        return loss_fn(output, target)
    except TypeError as error:
        if "object is not callable" not in str(error):
            raise
        raise TypeError(
            f"method {method!r}: loss_fn is called with (output, target) where data are pairs, and failed:"
            f" {error}; a loss of (model, batch) goes with batches that are mappings"
        ) from error


def run(model: Callable[..., Any], inputs: Any) -> Any:
    """Run the model on a batch's inputs: one tensor, a tuple of several, or a mapping of keyword inputs.

    Raises ``ValueError`` for inputs of a shape or type that the model fails on and was not captured with.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    except FAULTS as error:
        full = isinstance(error, torch.OutOfMemoryError)
        text = None if full or not isinstance(model, torch.nn.Module) else explain_misfit(inputs, model)
        if text is None:
            raise
        raise ValueError(text) from error


def classification_loss(output: Any, target: Any, method: str) -> torch.Tensor:
    """Compute mean cross entropy of logits (N, C, ...) and labels (N, ...), or probabilities of their shape.

    Raises ``TypeError`` where there are no such tensors, ``ValueError`` for shapes or labels that do not fit.
    """
    if target is None:
        raise ValueError(
            f"method {method!r}: data hold no labels, and the loss is cross entropy; pass pairs (x, y), or "
            "loss_fn=..., which gets None for y"
        )
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
