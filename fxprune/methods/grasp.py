"""GraSP: keeps the weights whose removal would harm the gradient's flow most."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.data import Batch
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.gradients import (
    Mode,
    count_of,
    loss_at,
    masked,
    mean_gradients,
    scoring,
    twice_differentiable,
)
from fxprune.sparsity.masks import Masks


def grasp(
    *,
    batches: int = 1,
    temperature: float | None = None,
    mode: Mode = "train",
    rank: Literal["signed", "absolute"] = "signed",
) -> Method:
    """Gradient signal preservation (Wang, Zhang, Grosse 2020, arXiv 2002.07376).

    Score: ``w * (H g)``, g being the mean gradient over batches and H the mean Hessian over the same ones:
    removing a weight changes the squared norm of the gradient by -2 w (H g), and the sign matters. Needs data
    with labels, best as many of each class (``fxprune.data.balanced``). One round.

    Options:
        batches: number of batches that are averaged
        temperature: the outputs are divided by it before the loss; by default 200 under cross entropy, and 1
            under a ``loss_fn`` of one's own
        mode: run the model in train mode or in eval mode
        rank: "signed" is the paper's; "absolute" ranks |w * (H g)| (Frankle et al. 2021, arXiv 2009.08576)

    Deviations from the authors' code: both passes see the same batches, which are not sorted by class, and
    the classifier is not drawn anew for scoring. Attention runs in its plain form here, which has a second
    derivative.

    Cost: per batch, a forward and a backward pass, and one of each that is differentiated again.
    When: at initialization, with labelled data, in one shot at high sparsities.
    """
    count_of("grasp", "batches", batches)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"method 'grasp': temperature={temperature!r}, expected a number above 0")

    def score(problem: Problem, masks: Masks) -> Scores:
        data = read_batches(problem, batches, "grasp")
        weights = masked(problem, masks)
        divisor = temperature or (200.0 if problem.loss_fn is None else 1.0)
        with scoring(problem, mode), twice_differentiable():
            products = _hessian_times_gradient(problem, weights, data, divisor)
        scores = {name: removal(product, problem.weights[name]) for name, product in products.items()}
        return {name: score.abs_() for name, score in scores.items()} if rank == "absolute" else scores

    return Method(
        name="grasp",
        find=from_scores(score, name="grasp"),
        needs=frozenset({"data"}),
        labels=True,
        summary="keeps the weights whose removal harms the flow of gradients most",
        paper="Wang et al. 2020, arXiv 2002.07376",
    )


def _hessian_times_gradient(
    problem: Problem, weights: dict[str, torch.Tensor], data: list[Batch], temperature: float
) -> dict[str, torch.Tensor]:
    """Return mean H times mean g, as the mean gradient of <g_b, mean g> with mean g held constant."""

    def loss(batch: Batch) -> torch.Tensor:
        return loss_at(problem, weights, batch, "grasp", temperature)

    def product_with_mean(batch: Batch) -> torch.Tensor:
        leaves = list(weights.values())
        slopes = torch.autograd.grad(loss(batch), leaves, create_graph=True, materialize_grads=True)
        pairs = zip(slopes, mean.values(), strict=True)
        return torch.stack([(slope * g.conj().to(slope.device)).real.sum() for slope, g in pairs]).sum()

    mean = mean_gradients(problem, weights, data, "grasp", of=loss)
    return mean_gradients(problem, weights, data, "grasp", of=product_with_mean)
