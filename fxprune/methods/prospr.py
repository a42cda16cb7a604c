"""ProsPr: SNIP through the first steps of training, by differentiating through them."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.data import Batch
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average, average_differentiably
from fxprune.scoring.gradients import Mode, count_of, loss_at, masked, scoring, twice_differentiable
from fxprune.sparsity.masks import Masks


def prospr(
    *,
    steps: int = 3,
    lr: float = 0.1,
    momentum: float = 0.0,
    batches: int = 1,
    order: Literal["full", "first"] = "full",
    mode: Mode = "train",
) -> Method:
    """Prospect pruning (Alizadeh et al. 2022, arXiv 2202.08132).

    Score: ``|w * dL(w_M)/dw_0|``, where w_0 = c * w at c = 1 and w_M comes after M steps of SGD on all
    parameters, the mask being applied at step 0 only. In full order that is
    ``|w * prod_t (I - lr H_t) g(w_M)|``. Needs data with labels. One round. No steps is SNIP.

    Options:
        steps: number M of training steps that are differentiated through
        lr: their learning rate
        momentum: their momentum
        batches: number of batches that the steps and the final loss take in turn; 1 repeats the same batch,
            ``steps + 1`` gives each a fresh one
        order: "full" differentiates through the steps, "first" takes w_M as w_0 plus a constant
        mode: run the model in train mode or in eval mode

    Deviation from the authors' code: with momentum, the first step is differentiated through like the others.
    Cost: ``steps + 1`` forward and backward passes, in full order with memory that grows with ``steps``.
    When: at initialization, with labelled data, up to about 98 %.
    """
    count_of("prospr", "batches", batches)
    if steps < 0:
        raise ValueError(f"method 'prospr': steps={steps!r}, expected an integer of at least 0")
    if not lr > 0 or not 0 <= momentum < 1:
        raise ValueError(f"method 'prospr': lr={lr!r}, momentum={momentum!r}, expected lr > 0 and 0 to 1")

    def score(problem: Problem, masks: Masks) -> Scores:
        data = read_batches(problem, batches, "prospr")
        start = masked(problem, masks)
        others = {
            name: parameter.detach().requires_grad_()
            for name, parameter in problem.model.named_parameters()
            if name not in start and (parameter.is_floating_point() or parameter.is_complex())
        }
        with scoring(problem, mode), twice_differentiable():
            final = _train(problem, start | others, data, steps, lr, momentum, full=order == "full")
            loss = loss_at(problem, final, data[steps % len(data)], "prospr")
            wanted = start if order == "full" else {name: final[name] for name in start}
            slopes = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
        homes = problem.weights
        found = {n: slope.to(homes[n].device) for n, slope in zip(start, slopes, strict=True)}
        average(found.values(), problem.group)
        return {n: removal(slope, homes[n]).abs_() for n, slope in found.items()}

    return Method(
        name="prospr",
        find=from_scores(score, name="prospr"),
        needs=frozenset({"data"}),
        labels=True,
        summary="SNIP through the first steps of training",
        paper="Alizadeh et al. 2022, arXiv 2202.08132",
    )


def _train(
    problem: Problem,
    parameters: dict[str, torch.Tensor],
    data: list[Batch],
    steps: int,
    lr: float,
    momentum: float,
    *,
    full: bool,
) -> dict[str, torch.Tensor]:
    """Return the parameters after SGD: functions of those before if ``full``, else new leaves."""
    velocities: dict[str, torch.Tensor] = {}
    for step in range(steps):
        loss = loss_at(problem, parameters, data[step % len(data)], "prospr")
        leaves = list(parameters.values())
        slopes = torch.autograd.grad(loss, leaves, create_graph=full, materialize_grads=True)
        for (name, parameter), slope in zip(tuple(parameters.items()), slopes, strict=True):
            slope = average_differentiably(slope, problem.group)
            velocity = slope + momentum * velocities[name] if momentum and name in velocities else slope
            moved = parameter - lr * velocity
            velocities[name] = velocity
            parameters[name] = moved if full else moved.detach().requires_grad_()
    return parameters
