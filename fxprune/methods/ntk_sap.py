"""NTK-SAP: keeps the weights that move the output most, averaged over initialisations and noise inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.module import CapturedModule
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average
from fxprune.scoring.gradients import count_of, run, scoring
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential
from fxprune.torch_private import BatchNorm, pytree

Weights = dict[str, torch.Tensor]


def ntk_sap(
    *,
    rounds: int = 20,
    repetitions: int = 1,
    epsilon: float = 0.01,
    init: Literal["kaiming", "own"] = "kaiming",
) -> Method:
    """Neural tangent kernel spectrum-aware pruning (Wang et al. 2023, arXiv 2304.02840).

    Score: ``|d/dm E ||f(x; w m) - f(x; (w + eps z) m)||^2|``, over weights w drawn anew, directions z and
    inputs x of standard normal noise: the trace of the neural tangent kernel, up to eps^2. What is pruned
    stays pruned. Needs shapes only: those of the first batch of ``data`` where there is some, else those of
    the example inputs. Inputs that are not real numbers (token ids) are taken from ``data`` as they are.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        repetitions: number of draws of weights, direction and input in every round
        epsilon: length of the step, relative to z
        init: "kaiming" draws weights from N(0, 2 / fan_in), "own" keeps those of the model

    BatchNorm statistics are those of the noise, at the weights w m: one pass in train mode sets them, both
    networks then run in eval mode. Biases and norms keep the model's values; the model itself is not touched
    (the authors' code leaves its last draw in it).

    Cost: ``rounds * repetitions`` times three forward passes and a backward one.
    When: at initialization, without labels; transformers at high sparsities.
    """
    count_of("ntk-sap", "repetitions", repetitions)
    if not epsilon > 0:
        raise ValueError(f"method 'ntk-sap': epsilon={epsilon!r}, expected a number above 0")

    def score(problem: Problem, masks: Masks) -> Scores:
        shapes = _read_inputs(problem)
        scores = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in problem.weights.items()
        }
        for _ in range(repetitions):
            gates = {name: mask.to(problem.device).float().requires_grad_() for name, mask in masks.items()}
            drawn = {name: _draw(problem, name, init) for name in gates}
            moved = {name: w + epsilon * _noise(problem, w) for name, w in drawn.items()}
            inputs = pytree.tree_map(lambda part: _noise_input(problem, part), shapes)
            with scoring(problem, "eval"):
                slopes = torch.autograd.grad(
                    _distance(problem, drawn, moved, gates, inputs), list(gates.values()),
                    materialize_grads=True,
                )  # fmt: skip
            for name, slope in zip(gates, slopes, strict=True):
                scores[name] += slope.to(scores[name].device)
        average(scores.values(), problem.group)
        return {name: score.abs_().mul_(masks[name]) for name, score in scores.items()}

    return Method(
        name="ntk-sap",
        find=from_scores(score, schedule=Exponential(rounds), name="ntk-sap"),
        summary="keeps the weights that move the output most, over random weights and noise inputs",
        paper="Wang et al. 2023, arXiv 2304.02840",
    )


def _distance(problem: Problem, drawn: Weights, moved: Weights, gates: Weights, inputs: Any) -> torch.Tensor:
    """Return ||f(x; w m) - f(x; (w + eps z) m)||^2; w = ``drawn``, w + eps z = ``moved``, m = ``gates``."""

    def outputs(weights: Weights, buffers: Weights) -> list[torch.Tensor]:
        gated = {name: weight * gates[name].to(weight.dtype) for name, weight in weights.items()}
        found = torch.func.functional_call(_Inputs(problem.model), _with_prefix(buffers | gated), (inputs,))
        return [part for part in pytree.tree_leaves(found) if isinstance(part, torch.Tensor)]

    buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    with torch.no_grad(), _batch_statistics(problem.model):
        outputs(drawn, buffers)
    pairs = zip(outputs(drawn, buffers), outputs(moved, buffers), strict=True)
    distances = [(a - b).square().sum() for a, b in pairs if a.is_floating_point()]
    total: torch.Tensor = torch.stack(distances).sum()
    # The outputs of a network without any path do not depend on the gates.
    return total if total.requires_grad else total + 0 * torch.stack([g.sum() for g in gates.values()]).sum()


class _Inputs(torch.nn.Module):
    """The model as a function of one argument, the inputs of a batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return run(self.model, inputs)


def _with_prefix(state: Weights) -> Weights:
    return {f"model.{name}": tensor for name, tensor in state.items()}


@contextmanager
def _batch_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Put norms with running statistics into train mode, so that these become those of the next batch."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _read_inputs(problem: Problem) -> Any:
    """Return inputs of the model, of which only shapes and types matter; ``run`` says in which forms."""
    if problem.data is not None:
        batch = read_batches(problem, 1, "ntk-sap")[0]
        if not batch.mapping:
            return batch.inputs
    if not isinstance(problem.model, CapturedModule):
        raise ValueError("method 'ntk-sap': the shapes of the inputs are not known, pass data=...")
    _, named = example_inputs_for(problem.model)
    return named


def _noise_input(problem: Problem, part: Any) -> Any:
    """Return noise in place of a real tensor; other inputs as they are."""
    if not isinstance(part, torch.Tensor):
        return part
    if part.is_floating_point():
        return _noise(problem, part)
    if part.device.type == "meta" or type(part) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(
            f"method 'ntk-sap': an input of type {part.dtype} cannot be noise; pass data=..., "
            "its first batch is taken as it is"
        )
    return part.to(problem.device)


def _noise(problem: Problem, like: torch.Tensor) -> torch.Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    noise = torch.randn(tuple(like.shape), generator=problem.generator)
    return noise.to(problem.device, like.dtype)


def _draw(problem: Problem, name: str, init: str) -> torch.Tensor:
    weight = problem.weights[name]
    if init == "own":
        return weight.to(problem.device)
    fan_in = max(weight.shape[1:].numel(), 1)
    return _noise(problem, weight).mul_(math.sqrt(2 / fan_in))
