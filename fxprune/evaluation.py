"""Compare a network with the dense one on data, and compute the statistics of its batch norms anew.

No labels are needed for the comparison, and no training for either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from fxprune.arguments import check_loss
from fxprune.capture.errors import check_module
from fxprune.keywords import refuse_unknown
from fxprune.network import inside
from fxprune.rewrite.masking.copying import duplicate
from fxprune.scoring.data import Batch, stream
from fxprune.scoring.distributed import average, everybody
from fxprune.scoring.gradients import run
from fxprune.scoring.walk import checked_tokens
from fxprune.torch_private import BatchNorm

__all__ = ["Evaluation", "evaluate", "recalibrate"]


@dataclass(frozen=True)
class Evaluation:
    """Hold what :func:`evaluate` measured, as means over ``positions`` (samples, tokens or pixels).

    ``loss``: in nats where it is a cross entropy; ``None`` where there is no loss. ``agreement``: the share
    of positions with the reference's first choice; ``kl``: the divergence from the reference's distribution,
    in nats; both ``None`` without a reference.
    """

    loss: float | None
    agreement: float | None
    kl: float | None
    positions: int

    @property
    def perplexity(self) -> float | None:
        """Return exp(loss)."""
        return None if self.loss is None else math.exp(self.loss)


def evaluate(
    model: nn.Module,
    data: Any,
    reference: nn.Module | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    **others: NoReturn,
) -> Evaluation:
    """Measure the loss of a network, and how far its outputs are from those of a reference.

    Args:
        model: any network with logits: a tensor, a tuple that starts with it, or an output or dict with
            ``logits``. It runs in evaluation mode and is left as it was.
        data: (x, y), a mapping of keyword inputs, inputs alone, or an iterable of such batches.
        reference: the dense network, or any other with outputs of the same shape.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(model, batch)`` for mappings. Without one, the loss
            is the ``loss`` among the outputs, else the cross entropy where targets fit the logits.

    Returns:
        An :class:`Evaluation`. Classes are on axis 1 of (N, C, ...), on the last one of logits (N, ..., C) if
        labels have the shape (N, ...) or logits come by name. Positions with a label of -100 or an
        ``attention_mask`` of 0 do not count.

    Raises:
        TypeError, ValueError: the data is none or holds no batch; tokens are out of range; outputs hold no
            logits, are NaN, or have another shape than the reference's; there is neither a loss nor a
            reference.

    >>> net = nn.Linear(2, 3)
    >>> found = evaluate(net, (torch.ones(4, 2), torch.tensor([0, 1, 2, 2])), reference=net)
    >>> found.agreement, round(found.kl, 6), found.positions
    (1.0, 0.0, 4)
    """
    refuse_unknown(evaluate, others)
    check_module(model)
    check_loss(loss_fn)
    if reference is not None:
        check_module(reference, "reference")
    sums = _Sums()
    networks = [inside(one) for one in (model, reference) if one is not None]
    device = next((parameter.device for parameter in networks[0].parameters()), torch.device("cpu"))
    with torch.no_grad(), _evaluating(networks):
        for index, batch in enumerate(stream(data, device, "evaluate")):
            where = f"batch {index} of data"
            output, loss = _outputs(networks[0], batch, loss_fn)
            logits, named = _logits(output, "model", where)
            other = None
            if reference is not None:
                other, _ = _logits(_outputs(networks[1], batch, loss_fn)[0], "reference", where)
                if other.shape != logits.shape:
                    raise ValueError(
                        f"reference: its logits have the shape {tuple(other.shape)}, the model's "
                        f"{tuple(logits.shape)} ({where})"
                    )
            sums.add(batch, logits, other, loss, named)
    if not sums.batches:
        raise ValueError("data: it yields no batch")
    return sums.means()


@contextmanager
def _evaluating(networks: list[nn.Module]) -> Iterator[None]:
    """Evaluation modes, checked tokens; modes and random numbers are put back."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        with torch.random.fork_rng(), checked_tokens(networks[0], "evaluate"):
            for network in networks:
                network.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Noting(nn.Module):
    """Runs a model for a loss, and keeps its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.model(*args, **kwargs)
        return self.output


def _outputs(
    model: nn.Module, batch: Batch, loss_fn: Callable[..., Tensor] | None
) -> tuple[Any, Tensor | None]:
    """The output of a model for a batch, and the loss if there is one."""
    if batch.mapping and loss_fn is not None:
        noting = _Noting(model)
        loss = loss_fn(noting, batch.inputs)
        return noting.output, loss
    output = run(model, batch.inputs)
    if loss_fn is not None:
        return output, loss_fn(output, batch.target)
    return output, _named(output, "loss")


def _named(output: Any, name: str) -> Tensor | None:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _logits(output: Any, who: str, where: str) -> tuple[Tensor, bool]:
    """The logits in an output, and whether they came by name."""
    named = _named(output, "logits")
    found = named
    if found is None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor) or found.dim() < 2:
        kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(f"{who}: returns {kind}, expected logits (N, ..., classes) ({where})")
    if bool(found.isnan().any()):
        raise ValueError(f"{who}: its logits are NaN ({where})")
    return found, named is not None


class _Sums:
    """Adds up what is measured, over batches."""

    def __init__(self) -> None:
        self.batches = self.positions = 0
        self.agreed = self.diverged = self.loss = 0.0
        self.weight = 0
        self.compared = False
        self.misfit = ""

    def add(
        self, batch: Batch, logits: Tensor, other: Tensor | None, loss: Tensor | None, named: bool
    ) -> None:
        """Add a batch."""
        labels = batch.inputs.get("labels") if isinstance(batch.inputs, Mapping) else None
        target = labels if isinstance(labels, Tensor) else batch.target
        axis = _class_axis(logits, target, named)
        flat = logits.movedim(axis, -1).flatten(0, -2).double()
        counted = _counted(batch, target, logits.movedim(axis, -1).shape[:-1])
        self.batches += 1
        self.positions += int(counted.sum())
        if loss is None and not batch.mapping and _fits(target, logits, axis):
            wanted = (
                target.flatten()
                if not target.is_floating_point()
                else target.movedim(axis, -1).flatten(0, -2)
            )
            loss = cross_entropy(flat[counted], wanted[counted])
        elif loss is None and not self.misfit:
            self.misfit = _described(target, logits)
        if loss is not None:
            self.loss += float(loss) * int(counted.sum())
            self.weight += int(counted.sum())
        if other is not None:
            dense = other.movedim(axis, -1).flatten(0, -2).double()
            self.compared = True
            self.agreed += int((flat.argmax(-1) == dense.argmax(-1))[counted].sum())
            first, second = log_softmax(dense[counted], -1), log_softmax(flat[counted], -1)
            terms = torch.where(first.isneginf(), 0.0, first.exp() * (first - second))
            self.diverged += float(terms.sum())

    def means(self) -> Evaluation:
        """The means over positions."""
        if not self.weight and not self.compared and self.misfit:
            raise ValueError(
                f"data: {self.misfit}, so that there is nothing to measure; pass labels (N, ...), loss_fn= or"
                " reference="
            )
        number = max(self.positions, 1)
        return Evaluation(
            loss=self.loss / self.weight if self.weight else None,
            agreement=self.agreed / number if self.compared else None,
            kl=self.diverged / number if self.compared else None,
            positions=self.positions,
        )


def _class_axis(logits: Tensor, target: Any, named: bool) -> int:
    last = logits.dim() - 1
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.shape == logits.shape[:1] + logits.shape[2:]:
            return 1
        if target.shape == logits.shape[:-1]:
            return last
    return last if named or logits.dim() == 3 else 1


def _fits(target: Any, logits: Tensor, axis: int) -> bool:
    """Whether a target holds labels of every position, or probabilities."""
    if not isinstance(target, Tensor):
        return False
    if target.is_floating_point():
        return target.shape == logits.shape
    if target.shape != logits.movedim(axis, -1).shape[:-1]:
        return False
    labels = target[target != -100]
    return not labels.numel() or (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[axis])


def _described(target: Any, logits: Tensor) -> str:
    """Say of a target that is none for a cross entropy what it is."""
    if target is None:
        return "it holds no labels"
    if not isinstance(target, Tensor):
        return f"its labels are a {type(target).__name__}, its logits {tuple(logits.shape)}"
    known = target[target != -100]
    span = f" from {known.min().item():g} to {known.max().item():g}" if known.numel() else ""
    return f"labels of shape {tuple(target.shape)}{span} do not fit logits of shape {tuple(logits.shape)}"


def _counted(batch: Batch, target: Any, shape: torch.Size) -> Tensor:
    """Mark the positions that count, flat."""
    counted = torch.ones(shape, dtype=torch.bool)
    if isinstance(target, Tensor) and not target.is_floating_point() and target.shape == shape:
        counted &= target.cpu() != -100
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == shape:
        counted &= mask.cpu() != 0
    return counted.flatten()


def recalibrate(
    model: nn.Module, data: Any, loss_fn: Callable[..., Tensor] | None = None, **others: NoReturn
) -> nn.Module:
    """Compute the running statistics of all batch norms anew, as means over the batches of ``data``.

    Every batch norm sees its batches as in training, everything else runs as in evaluation; the means and
    variances of the batches are averaged, each counts the same.

    Args:
        model: a network, pruned or not.
        data: inputs, (x, y), a mapping of keyword inputs, or an iterable of such batches; labels are not
            looked at.
        loss_fn: ``loss_fn(model, batch)``, where mappings do not name the model's inputs.

    Returns:
        A copy with new statistics; parameters, masks and modes are those of ``model``. Several processes
        with data of their own all get the means over all batches.

    Raises:
        ValueError: there is no batch norm with running statistics, no batch, or one of a single value.

    >>> net, x = nn.Sequential(nn.BatchNorm1d(1)), torch.tensor([[1.0], [3.0]])
    >>> recalibrate(net, [(x, x), (x + 2, x)])[0].running_mean
    tensor([3.])
    """
    refuse_unknown(recalibrate, others)
    check_module(model)
    check_loss(loss_fn)
    result = duplicate(model)
    inner = inside(result)
    norms = [
        module
        for module in inner.modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError(
            "model: it has no batch norm with running statistics, so that there is nothing to do"
        )
    device = norms[0].running_mean.device  # type: ignore[union-attr]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with torch.no_grad(), _evaluating([inner]):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        for batch in stream(data, device, "recalibrate"):
            _outputs(inner, batch, loss_fn if batch.mapping else None)
            seen += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if not _share(norms, seen):
        raise ValueError("data: it yields no batch")
    return result


def _share(norms: Sequence[nn.Module], seen: int) -> int:
    """Make statistics those of the batches of all processes; return how many these are."""
    group = everybody()
    if group is None:
        return seen
    named = [norm.get_buffer(name) for norm in norms for name in ("running_mean", "running_var")]
    number = torch.tensor(float(seen), device=named[0].device)
    sums = [statistic.float() * number for statistic in named]
    average([*sums, number], group)
    batches = round(number.item() * group.size())
    if batches:
        for norm in norms:
            norm.get_buffer("num_batches_tracked").fill_(batches)
        for statistic, total in zip(named, sums, strict=True):
            statistic.copy_(total / number)
    return batches
