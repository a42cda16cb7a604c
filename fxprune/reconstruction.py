"""Fit the weights that a pruned network kept, layer by layer, to what the dense network computes.

A pruned model, the dense one and calibration data come in; a copy of the pruned model goes out, with the same
masks and other weights. No gradients, no labels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup

from fxprune.arguments import check_flags, check_loss
from fxprune.capture import CaptureError, capture_own, renamed
from fxprune.capture.inputs import example_inputs_for
from fxprune.graph import ChannelGraph
from fxprune.keywords import refuse_unknown
from fxprune.lowering import graph_of_run, lower
from fxprune.methods import Problem
from fxprune.network import inside
from fxprune.progress import Display
from fxprune.request import resolve_device
from fxprune.rewrite import plain, put_masks, read
from fxprune.rewrite.masking.computed import computed_weights, settled
from fxprune.rewrite.masking.copying import duplicate
from fxprune.rewrite.masking.parameters import unwrap
from fxprune.scoring.distributed import agree, average, everybody
from fxprune.scoring.forms import warn_of_two_inputs
from fxprune.scoring.least_squares import fit_kept
from fxprune.scoring.sequential import Layer, Matrix, solve_layers
from fxprune.scoring.shapes import inputs_of
from fxprune.scoring.solved import SolvedLayers, look
from fxprune.scoring.walk import Stage
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.masks import Masks, is_full, kept, nonzeros
from fxprune.torch_private import BatchNorm

__all__ = ["reconstruct"]

NAME = "reconstruct"


def reconstruct(
    model: nn.Module,
    data: Any,
    reference: nn.Module,
    *,
    example_inputs: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    damp: float | None = None,
    bias: bool = True,
    norms: bool = True,
    propagate: bool = True,
    iterations: int = 100,
    micro_batch: int | None = None,
    device: str | torch.device | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **others: NoReturn,
) -> nn.Module:
    """Fit the kept weights of every layer to the outputs of the dense layer, by least squares.

    Layer by layer, ``|X_d W_d - X W|^2 + damp * mean(diag(X^T X)) * |W_d - W|^2`` is minimised over kept
    weights W: X are a layer's inputs in the pruned network as fitted so far, X_d and W_d those in the dense.

    Args:
        model: a pruned network, of any method; masked, or plain with zeros.
        data: inputs, (x, y), a mapping, or an iterable of batches; all are used, and no labels.
        reference: the network before it was pruned, with the same parameters by name.
        example_inputs: as for :func:`fxprune.apply`, for a model not captured yet; else as in ``data``.
        loss_fn: ``loss_fn(model, batch)``, where batches are mappings that do not name the model's inputs.
        damp: how much weights are held to the dense ones, as a share of the mean square input. None, for
            8 times the inputs of an output over the vectors of inputs in the data, from 0.01 to 10.
        bias: whether biases of fitted layers are fitted with them.
        norms: whether batch norms get statistics that give their outputs the dense mean and variance.
        propagate: False, to fit every layer on its own, on the inputs that the pruned network gives it.
        iterations: steps of conjugate gradients at most.
        checkpoint_dir: a folder that keeps fitted layers; after a kill the same call goes on at the next one.
        micro_batch, device, progress: as for :func:`fxprune.apply`.
    Returns a copy of ``model`` with the same masks, in every process what one would find on all data. Raises
    ``TypeError``, ``ValueError``: an argument does not fit, nothing is pruned, inputs are not finite.

    >>> import fxprune
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 4)
    >>> pruned = fxprune.apply(net, "wanda", 0.5, data=x, progress=False)
    >>> fitted = fxprune.reconstruct(pruned, x, net, progress=False)
    >>> bool((fitted(x) - net(x)).square().sum() < (pruned(x) - net(x)).square().sum())
    True
    """
    refuse_unknown(reconstruct, others)
    _check(model, reference, data, damp, iterations, loss_fn)
    check_flags(bias=bias, norms=norms, propagate=propagate)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        masks, source = _masks(model), plain(settled(inside(model)))
        if example_inputs is None and not isinstance(source, fx.GraphModule):
            example_inputs, data = inputs_of(data, source)
        problem = _problem(source, masks, example_inputs, device, Display(enabled=progress),
                           data=data, loss_fn=loss_fn, micro_batch=micro_batch)  # fmt: skip
        twin = _with_values(duplicate(problem.model), reference).eval()
        fit = _Fit(problem, twin, damp, bias, iterations, read(inside(model)))
        found = _solve(problem, fit, norms, propagate, checkpoint_dir) | fit.biases
        return _rewritten(model, found, fit.statistics, masks)


def _solved(
    folder: str | os.PathLike[str], facts: Mapping[str, Any], problem: Problem, twin: nn.Module
) -> SolvedLayers:
    """The layers that were fitted before by the same options, to the same networks."""
    networks = {"model": problem.model, "reference": twin}
    seen = {
        which: {name: look(tensor) for name, tensor in network.state_dict().items()}
        for which, network in networks.items()
    }
    facts = {**facts, **seen, "masks": kept(problem.masks)}
    return SolvedLayers(os.path.join(folder, NAME), facts, problem.group)


def _solve(
    problem: Problem, fit: _Fit, norms: bool, propagate: bool, folder: str | os.PathLike[str] | None
) -> dict[str, Tensor]:
    """Fit all layers; return their weights."""
    facts = {"damp": fit.damp, "bias": fit.bias, "norms": norms, "propagate": propagate}
    facts["iterations"] = fit.iterations
    solved = None if folder is None else _solved(folder, facts, problem, fit.twin)
    if problem.group is not None:
        agree(problem.masks, problem.group)
    options: dict[str, Any] = {"twin": fit.twin, "passed": fit.match if norms else None} if propagate else {}
    _, found = solve_layers(
        problem,
        fit.solve,
        batches=None,
        propagate=propagate,
        method=NAME,
        unseen="left as they are",
        solved=solved,
        biases=fit.biases,
        **options,
    )
    if problem.group is not None:
        agree({**found, **fit.biases, **fit.statistics}, problem.group, "fitted weights")
    return found


def _check(
    model: nn.Module, reference: nn.Module, data: Any, damp: float | None, iterations: int, loss_fn: Any
) -> None:
    for argument, value in (("model", model), ("reference", reference)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"{argument}: expected a torch.nn.Module, got a {type(value).__name__}")
    if isinstance(damp, bool) or (damp is not None and not damp >= 0):
        raise ValueError(f"damp={damp!r}: expected a share of the mean square input, at least 0")
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: expected a number of steps, at least 1")
    check_loss(loss_fn)
    warn_of_two_inputs(data)


def _masks(model: nn.Module) -> Masks:
    """The masks of matrices that are parameters; where there are none, the places that are not zero.

    Computed weights cannot be given values of their own; a warning names them.
    """
    inner = unwrap(inside(model))
    found = read(inner)
    if not found:
        names = [name for name, parameter in inner.named_parameters() if parameter.dim() > 1]
        found = {name: mask for name, mask in nonzeros(inner, names).items() if not is_full(mask)}
    found = {name: mask for name, mask in found.items() if mask.dim() > 1}
    if not found:
        raise ValueError("model: it has no masks and no zeros, so that there is nothing to make up for")
    computed = [name for name in computed_weights(inner) if found.pop(name, None) is not None]
    if computed and not found:
        raise ValueError(
            f"model: {computed[0]!r} is computed by a parametrization, so that its values cannot be fitted; "
            "take fxprune.finalize(model), which removes it"
        )
    if computed:
        rest = f" and {len(computed) - 1} more are" if len(computed) > 1 else " is"
        warnings.warn(
            f"reconstruct: {computed[0]!r}{rest} computed by a parametrization, and stays as it is; "
            "fxprune.finalize(model) removes parametrizations",
            stacklevel=3,  # the line that called reconstruct
        )
    return found


def _problem(
    source: nn.Module,
    masks: Masks,
    example_inputs: Any,
    device: str | torch.device | None,
    progress: Display,
    **fields: Any,
) -> Problem:
    """The layers to fit, on a private copy of the network."""
    student, graph = _captured(source, example_inputs)
    where = resolve_device(device) or next(iter(student.parameters())).device
    student = student.to(where)
    return Problem(
        model=student,
        graph=graph,
        weights={name: student.get_parameter(name).detach() for name in masks},
        masks={name: mask.to(where) for name, mask in masks.items()},
        budget=Budget(sum(kept(masks).values()), {name: mask.numel() for name, mask in masks.items()}),
        device=where,
        group=everybody(),
        progress=progress,
        **fields,
    )


def _captured(source: nn.Module, example_inputs: Any) -> tuple[nn.Module, ChannelGraph]:
    """A private copy of the network, captured where that is possible."""
    try:
        if isinstance(source, fx.GraphModule) and example_inputs is None:
            gm: fx.GraphModule = source
            graph = lower(gm)
        else:
            gm = capture_own(source, example_inputs)
            graph = lower(gm)
        return duplicate(gm), graph
    except CaptureError as error:
        args, kwargs = example_inputs_for(source, example_inputs)
        return duplicate(source), graph_of_run(duplicate(source), args, kwargs, str(error))


def _with_values(twin: nn.Module, reference: nn.Module) -> nn.Module:
    """Give a copy of the pruned network the parameters and buffers of the dense one."""
    dense = settled(unwrap(inside(reference)))
    own = dict(dense.named_parameters(remove_duplicate=False))
    buffers = dict(dense.named_buffers(remove_duplicate=False))
    wanted = [name for name, _ in twin.named_parameters()]
    if own.keys().isdisjoint(wanted) and renamed(own).keys() >= set(wanted):  # its graph calls it as a whole
        own, buffers = renamed(own), renamed(buffers)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name not in own or own[name].shape != parameter.shape:
                has = f"it has the shape {tuple(own[name].shape)}" if name in own else "it has none"
                raise ValueError(
                    f"reference: parameter {name!r} of shape {tuple(parameter.shape)} is wanted, and {has}; "
                    "pass the network that was pruned"
                )
            parameter.copy_(own[name])
        for name, buffer in twin.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
    return twin


def _damping(asked: float | None, matrix: Matrix) -> float:
    """The damping that was asked for, or one in proportion to inputs per vector of inputs."""
    inputs = matrix.moments.shape[-1]
    return min(10.0, max(0.01, 8 * inputs / max(matrix.rows, 1))) if asked is None else asked


class _Fit:
    """Solves layers, and holds what is found besides weights: biases, statistics of batch norms."""

    def __init__(
        self,
        problem: Problem,
        twin: nn.Module,
        damp: float | None,
        bias: bool,
        iterations: int,
        masks: Masks,
    ) -> None:
        self.student, self.group = problem.model, problem.group
        self.twin, self.damp, self.bias = twin, damp, bias
        self.iterations, self.masks = iterations, masks
        self.biases: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}

    def solve(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Fit a layer; weights without inputs stay."""
        dense = self.twin.get_parameter(layer.name).detach().to(layer.weight.dtype)
        weight = (layer.weight * layer.mask).clone()
        bias = self._bias(layer)
        for matrix in layer.matrices:
            keep, wanted = layer.mask.view(-1)[matrix.positions], dense.reshape(-1)[matrix.positions]
            moments, cross = matrix.moments, matrix.moments if matrix.cross is None else matrix.cross
            means = None if matrix.sums is None or bias is None else matrix.sums / matrix.total
            if means is not None:  # the last are those of the twin, if there is one
                moments = moments - matrix.total * means[0].unsqueeze(-1) * means[0].unsqueeze(-2)
                cross = cross - matrix.total * means[0].unsqueeze(-1) * means[-1].unsqueeze(-2)
            hold = (
                _damping(self.damp, matrix)
                * matrix.moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            )
            target = cross @ wanted + hold * wanted
            held = moments + hold * torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
            start = weight.view(-1)[matrix.positions]
            values = fit_kept(held, target, keep, start, iterations=self.iterations, tolerance=1e-6)
            weight.view(-1)[matrix.positions] = values
            if means is not None and bias is not None:
                shift = (means[-1].unsqueeze(-2) @ wanted - means[0].unsqueeze(-2) @ values).flatten()
                self.biases[bias] = self._bias_of(bias, shift)
        return layer.mask, weight

    def _bias(self, layer: Layer) -> str | None:
        """The bias that is added to a layer's outputs, if it is known and fitted."""
        name = layer.name.removesuffix("weight") + "bias"
        if not self.bias or not layer.name.endswith("weight") or len(layer.matrices) != 1:
            return None
        found = dict(self.student.named_parameters()).get(name)
        parts, _, outputs = layer.matrices[0].positions.shape
        return name if found is not None and found.numel() == parts * outputs else None

    def _bias_of(self, name: str, shift: Tensor) -> Tensor:
        parameter = self.student.get_parameter(name)
        dense = self.twin.get_parameter(name).detach()
        new = (dense + shift.view_as(dense)).to(parameter.dtype)
        if name in self.masks:
            new = new * self.masks[name].to(new.device)
        return new

    def match(self, stage: Stage, other: Stage) -> None:
        """At a batch norm, choose the statistics that give its outputs the twin's mean and variance."""
        module = stage.module
        if not isinstance(module, BatchNorm) or module.running_mean is None:
            return
        mean, variance = _statistics(stage, self.group)
        wanted, spread = _statistics(other, self.group)
        dense = other.module
        assert isinstance(dense, BatchNorm)
        assert dense.running_mean is not None
        assert dense.running_var is not None
        assert module.running_var is not None
        ratio = torch.where((spread > 0) & (variance > 0), variance / spread, 1.0)
        new_variance = (dense.running_var + dense.eps) * ratio - module.eps
        new_mean = mean - (wanted - dense.running_mean) * ratio.sqrt()
        with torch.no_grad():
            module.running_mean.copy_(new_mean)
            module.running_var.copy_(new_variance.clamp(min=0))
        self.statistics[f"{stage.target}.running_mean"] = module.running_mean.clone()
        self.statistics[f"{stage.target}.running_var"] = module.running_var.clone()


def _statistics(stage: Stage, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The mean and variance of the channels of what a node reads, over the data of all processes."""
    number, total, squares = torch.zeros((), dtype=torch.float64), torch.zeros(()), torch.zeros(())
    for piece in range(stage.count):
        assert stage.read is not None
        x = stage.read(piece)
        x = x.to(torch.float64).transpose(0, 1).flatten(1)
        number += x.shape[1]
        total, squares = total + x.sum(1).cpu(), squares + x.square().sum(1).cpu()
    average([number, total, squares], group)
    mean = total / number
    return mean, (squares / number - mean.square()).clamp(min=0)


def _rewritten(
    model: nn.Module, values: dict[str, Tensor], statistics: dict[str, Tensor], masks: Masks
) -> nn.Module:
    """A copy of the pruned model with new parameters and statistics."""
    result = duplicate(model)
    inner = unwrap(inside(result))
    with torch.no_grad():
        for name, value in values.items():
            inner.get_parameter(name).copy_(value)
        for name, value in statistics.items():
            inner.get_buffer(name).copy_(value)
        if read(inner):
            put_masks(result, read(inner))
        else:
            for name, mask in masks.items():
                inner.get_parameter(name).mul_(mask)
    return result
