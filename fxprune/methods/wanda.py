"""Wanda: magnitudes times the norms of what the weights read, compared within each output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fxprune.channels.orientation import output_first
from fxprune.graph import KernelSet, ir
from fxprune.scoring.complex_weights import refuse_complex
from fxprune.scoring.contract import Method, Problem, Scores, from_scores, round_budgets
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import agree
from fxprune.scoring.gradients import count_of, masked
from fxprune.scoring.inputs import InputNorms, input_norms
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.channel_granularity import Oriented
from fxprune.sparsity.granularity import NM, WEIGHT
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.lines import best_of_lines, split_by_places
from fxprune.sparsity.masks import Masks, is_full
from fxprune.sparsity.schedule import OneShot, resolve
from fxprune.sparsity.select import check_scores, select


def wanda(*, batches: int = 1, compare: Literal["output", "layer", "model"] = "output") -> Method:
    """Pruning by weights and activations (Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695).

    Score: ``|w_ij| * ||x_j||_2``, the norm of the weight's input over all samples and positions (eq. 1).
    Needs data; labels are not looked at. For pretrained networks: one pass, no update of weights.

    Options:
        batches: number of batches that norms are measured over
        compare: weights compete with those of the same "output" (the paper's; experts in one parameter have
            theirs each), of the same "layer" (better for image classifiers, section 5), or of the "model"

    Within outputs or layers every one of them loses the same share, or what ``budget`` gives its layer.
    Channels compete by their plain scores. A layer that a network applies several times reads all its inputs.

    Cost: a forward pass per batch.
    When: for large pretrained networks that are not trained afterwards, without labels.
    """
    count_of("wanda", "batches", batches)

    def measured(problem: Problem, weights: Mapping[str, torch.Tensor]) -> InputNorms:
        refuse_complex(problem, "wanda")
        return input_norms(problem, weights, read_batches(problem, batches, "wanda"), "wanda")

    def score(problem: Problem, masks: Masks) -> Scores:
        norms = measured(problem, masked(problem, masks))
        scores = {name: w.abs() * masks[name] * norms.of(name) for name, w in problem.weights.items()}
        if compare == "model" or isinstance(problem.granularity, ChannelGroups):
            return scores
        outputs = _outputs(problem)
        return {name: _ranks(score, outputs[name], compare) for name, score in scores.items()}

    by_scores = from_scores(score, name="wanda")

    def find(problem: Problem) -> Masks:
        full = compare != "model" and _is_full_pattern(problem)
        if not full and (compare != "output" or not _is_dense(problem)):
            return by_scores(problem)
        for budget in round_budgets(problem, schedule=OneShot(), regrow=False, name="wanda"):
            weights = {name: weight.to(problem.device) for name, weight in problem.weights.items()}
            norms = measured(problem, masked(problem, problem.masks) if full else weights)
            masks = _best_of_groups(problem, norms) if full else _best_of_outputs(problem, norms, budget)
            if problem.group is not None:
                agree(masks, problem.group)
            return masks
        return problem.masks

    return Method(
        name="wanda",
        find=find,
        needs=frozenset({"data"}),
        summary="keeps the weights with the largest product of magnitude and input, for pretrained networks",
        paper="Sun et al. 2024, arXiv 2306.11695",
    )


def _is_dense(problem: Problem) -> bool:
    """Whether single weights of a network that has all of them are pruned in one round."""
    once = resolve(problem.schedule, OneShot()).rounds == 1
    plain = problem.granularity == WEIGHT and problem.shards is None and not problem.invert
    if not once or not plain:
        return False
    return all(is_full(mask) for mask in problem.masks.values())


def _is_full_pattern(problem: Problem) -> bool:
    """Whether a pattern n:m keeps all that it has room for, so that only weights of one group compete."""
    grain = problem.granularity
    inner = grain.inner if isinstance(grain, Oriented) else grain
    once = resolve(problem.schedule, OneShot()).rounds == 1
    if not isinstance(inner, NM) or not once or problem.shards is not None or problem.invert:
        return False
    return problem.budget.total == sum(grain.room(problem.masks).values())


def _best_of_groups(problem: Problem, norms: InputNorms) -> Masks:
    """The masks of a full pattern n:m, with the scores of one layer at a time."""
    masks: Masks = {}
    for name, number in problem.granularity.room(problem.masks).items():
        mask, weight = problem.masks[name], problem.weights[name]
        masks |= select(
            {name: weight.abs() * mask * norms.of(name)},
            Budget(number, {name: weight.numel()}),
            within={name: mask},
            granularity=problem.granularity,
            method="wanda",
        )
    return masks


def _best_of_outputs(problem: Problem, norms: InputNorms, budget: Budget) -> Masks:
    """The masks that selection by ranks finds, layer by layer: with the scores of one layer at a time."""
    outputs = _outputs(problem)
    sides = {name: one.sides for name, one in outputs.items()}
    numbers = split_by_places(sides, budget.total) if budget.layers is None else budget.layers
    masks: Masks = {}
    for name, weight in problem.weights.items():
        own, number = outputs[name], numbers[name]
        score = weight.abs() * norms.of(name)
        alone = Budget(number, {name: weight.numel()})
        check_scores({name: score}, alone, "wanda")
        if not own.are_first and number % own.sides[0]:
            # Which outputs keep one more goes by the order of weights in the parameter.
            masks |= select({name: _ranks(score, own)}, alone, method="wanda")
            continue
        masks[name] = own.back(best_of_lines(own.lines(score), number)).contiguous()
    return masks


@dataclass(frozen=True)
class _Outputs:
    """The outputs of a parameter: its first axis, or several axes, as in a stack of matrices."""

    shape: torch.Size
    kernels: KernelSet | None
    axes: tuple[int, ...]

    @property
    def are_first(self) -> bool:
        """Whether the parameter lies as its outputs do, one after another."""
        return self.axes == tuple(range(len(self.axes))) and not (self.kernels and self.kernels.transposed)

    @property
    def order(self) -> list[int]:
        return [*self.axes, *(axis for axis in range(len(self.shape)) if axis not in self.axes)]

    @property
    def sides(self) -> tuple[int, int]:
        """The number of outputs, and of weights of each."""
        lines = self.lines(torch.empty(self.shape, device="meta"))
        return lines.shape[0], lines.shape[1]

    def lines(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as (outputs, weights of each)."""
        if len(self.axes) == 1:
            return output_first(tensor, self.kernels).flatten(1)
        return tensor.permute(self.order).flatten(0, len(self.axes) - 1).flatten(1)

    def back(self, lines: torch.Tensor) -> torch.Tensor:
        """The same the other way round."""
        if len(self.axes) == 1:
            own = output_first(torch.empty(self.shape, device="meta"), self.kernels).shape
            return output_first(lines.view(own), self.kernels)
        order = self.order
        places = sorted(range(len(order)), key=order.__getitem__)
        return lines.view([self.shape[axis] for axis in order]).permute(places)


def _outputs(problem: Problem) -> dict[str, _Outputs]:
    """The outputs of every weight: in a stack of matrices, of experts for one, those of each matrix."""
    kernels = problem.graph.kernels
    several: dict[str, tuple[int, ...]] = {}
    for op in problem.graph.ops:
        for use in op.params if isinstance(op, ir.Kernel) else ():
            found = [axis for axis, at in enumerate(use.axes) if at and at.value == op.output.index]
            if len(found) > 1:
                several.setdefault(use.name, tuple(found))
    return {
        name: _Outputs(weight.shape, kernels.get(name), several.get(name, (0,)))
        for name, weight in problem.weights.items()
    }


def _ranks(score: torch.Tensor, own: _Outputs, compare: str = "output") -> torch.Tensor:
    """The rank of every weight among those it competes with, in (0, 1): a threshold keeps equal shares."""
    whole = own.lines(score)
    lines = whole if compare == "output" else whole.reshape(1, -1)
    order = lines.argsort(dim=1, stable=True, descending=True)
    places = torch.arange(lines.shape[1], device=lines.device, dtype=torch.float64)
    ranks = torch.empty_like(lines, dtype=torch.float64).scatter_(
        1, order, (1 - (places + 0.5) / lines.shape[1]).expand_as(lines)
    )
    return own.back(ranks.view(whole.shape))
