"""SparseGPT: optimal brain surgery, input by input and layer by layer, on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.scoring.contract import Found, Method, Problem
from fxprune.scoring.gradients import count_of
from fxprune.scoring.layer_plan import Plan, choose_in_layer, solve_in_rounds
from fxprune.scoring.sequential import Layer, Matrix
from fxprune.scoring.surgeon import Chooser, check_damp, damping, dense_scores, surgery, upper_factor
from fxprune.sparsity.budget import Budget, apportion
from fxprune.sparsity.channel_granularity import Oriented
from fxprune.sparsity.granularity import NEVER, NM, WEIGHT, Granularity
from fxprune.sparsity.lines import best_of_lines
from fxprune.sparsity.masks import is_full
from fxprune.sparsity.select import select

NAME = "sparsegpt"


def sparsegpt(
    *,
    batches: int = 1,
    damp: float | None = None,
    block: int = 128,
    propagate: bool = True,
    split: Literal["equal", "error"] = "equal",
    checkpoint_dir: str | None = None,
) -> Method:
    """One-shot pruning with updates of the weights that stay (Frantar, Alistarh 2023, arXiv 2301.00774).

    Input by input, weights are removed by ``w^2 / [H^-1]_jj``, H the second moments of a layer's inputs, and
    the weights of the inputs after it make up for the error (algorithm 1). Needs data; labels are not looked
    at. Layers are solved in the order in which the network computes.

    Options:
        batches: number of batches that are run
        damp: added to the diagonal of the inputs' moments, as a share of its mean; None, for 10 / sqrt(rows)
            of a layer with so many vectors of inputs in the data, and at least the paper's 0.01
        block: inputs whose weights are chosen together (the paper's Bs); in a pattern n:m, m of them
        propagate: whether a layer sees what the pruned layers before it give, instead of the dense ones
        split: under ``budget="global"`` every layer loses an "equal" share, as in the paper, or the one at
            which a further weight costs all the same "error", relative to the outputs of its layer
        checkpoint_dir: a folder that keeps solved layers; after a kill the same call with the same data goes
            on at the next

    Blocks and kernels are chosen
    by the sum of their scores when their layer is solved, channels by the scores in the dense network.
    Deviations from the authors' code: the budget is kept to one weight; blocks share it by their inputs that
    are not always zero, and weights of inputs that are go first, but are not changed where they stay.

    Cost: a forward pass per batch, and for each layer the inverse of a matrix of its inputs' size.
    When: for large pretrained networks that are not trained afterwards, where `wanda` loses too much.
    """
    count_of(NAME, "batches", batches)
    count_of(NAME, "block", block)
    check_damp(NAME, damp)

    def find(problem: Problem) -> Found:
        return solve_in_rounds(
            problem,
            lambda plan, layer: solve_layer(layer, plan, damp, block),
            lambda layer: dense_scores(layer.weight, layer.matrices, layer.unseen, damp),
            batches=batches,
            propagate=propagate,
            method=NAME,
            split=split,
            checkpoint_dir=checkpoint_dir,
            options={"damp": damp, "block": block},
        )

    return Method(
        name="sparsegpt",
        find=find,
        needs=frozenset({"data"}),
        summary="removes weights input by input, and later ones make up for it; for pretrained networks",
        paper="Frantar & Alistarh 2023, arXiv 2301.00774",
        scored=False,
        updates=True,
    )


@dataclass(frozen=True)
class _Ready:
    """A matrix with its inputs in the order of removal, the factor of its Hessian, and which are zero.

    ``whole``: whether its places are those of one matrix (outputs, inputs), as it lies in the parameter.
    """

    positions: Tensor
    factor: Tensor
    dead: Tensor
    whole: bool


def _ready(layer: Layer, matrix: Matrix, damp: float | None, taps_first: bool = False) -> _Ready:
    positions, moments = matrix.positions, matrix.moments
    if taps_first and matrix.taps > 1:
        inputs = torch.arange(positions.shape[1], device=positions.device)
        order = inputs.view(-1, matrix.taps).mT.flatten()
        positions, moments = positions[:, order], moments[:, order][:, :, order]
    dead = moments.diagonal(dim1=-2, dim2=-1) == 0
    factor = upper_factor(moments, damping(damp, matrix.rows))
    return _Ready(positions, factor, dead, _is_whole(layer.weight.numel(), positions))


def solve_layer(layer: Layer, plan: Plan, damp: float | None, block: int) -> tuple[Tensor, Tensor]:
    """Return the mask and the new weights of one layer."""
    if not plan.masks and plan.layers[layer.name] == int(layer.mask.sum()):
        return layer.mask, layer.weight
    pattern = _pattern(plan, layer)
    if pattern is not None:
        return _column_blocks(layer, plan, pattern, damp, pattern.m if isinstance(pattern, NM) else block)
    mask = choose_in_layer(plan, layer, dense_scores(layer.weight, layer.matrices, layer.unseen, damp))
    weight = layer.weight * mask
    for matrix in layer.matrices:
        ready = _ready(layer, matrix, damp)
        keep = mask.view(-1)[ready.positions]
        values = layer.weight.view(-1)[ready.positions]
        surgery(values, ready.factor, _given(keep), block)
        weight.view(-1)[ready.positions] = values
    return mask, weight


def _given(keep: Tensor) -> Chooser:
    """The chooser of masks that are known."""
    return lambda first, last, scores: keep[:, first:last]


def _pattern(plan: Plan, layer: Layer) -> Granularity | None:
    """The granularity, if weights can be chosen a few inputs at a time: single weights, and n:m of inputs."""
    if plan.masks:
        return None
    if plan.granularity == WEIGHT:
        return WEIGHT
    turned = isinstance(plan.granularity, Oriented) and layer.name in plan.granularity.transposed
    inner = plan.granularity.inner if isinstance(plan.granularity, Oriented) else plan.granularity
    if not isinstance(inner, NM) or len(layer.unseen):
        return None
    # Dim 1 of the parameter, 0 where it is turned, has to run over the inputs of every matrix, all of them.
    axis = 0 if turned else 1
    shape = layer.weight.shape
    for matrix in layer.matrices:
        steps = matrix.positions[:, :: matrix.taps, :]
        along = torch.stack(torch.unravel_index(steps, shape))
        inputs = along[axis] % steps.shape[1]
        others = torch.cat([along[:axis], along[axis + 1 :]])
        if not torch.equal(
            inputs, torch.arange(steps.shape[1], device=inputs.device).view(1, -1, 1).expand_as(inputs)
        ):
            return None
        if not bool((others == others[:, :, :1]).all()) or (not turned and steps.shape[1] != shape[1]):
            return None
    return inner


def _column_blocks(
    layer: Layer, plan: Plan, pattern: Granularity, damp: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Choose weights block by block of inputs, each when the blocks before it are done."""
    mask, weight = layer.mask.clone(), layer.weight.clone()
    flat_mask, flat = mask.view(-1), weight.view(-1)
    steps = [_ready(layer, matrix, damp, pattern != WEIGHT) for matrix in layer.matrices]
    may_stay = [_read(flat_mask, step) for step in steps]
    numbers = iter(_block_budgets(layer, plan.layers[layer.name], steps, may_stay, pattern, block))
    for step, within in zip(steps, may_stay, strict=True):
        values = _read(flat, step)
        chooser = _chooser(layer.name, within, step.dead, pattern, numbers)
        _write(flat_mask, step, surgery(values, step.factor, chooser, block))
        _write(flat, step, values)
    if len(layer.unseen):
        size = flat[layer.unseen].abs()
        chosen = _best(layer.name, size[:, None], flat_mask[layer.unseen][:, None], WEIGHT, next(numbers))
        flat_mask[layer.unseen] = chosen[:, 0]
        flat[layer.unseen] *= chosen[:, 0]
    return mask, weight


def _is_whole(number: int, positions: Tensor) -> bool:
    """Whether places are those of one matrix (outputs, inputs), as it lies in a parameter of so many."""
    parts, inputs, _ = positions.shape
    if parts > 1 or positions.numel() != number or positions.stride()[1:] != (1, inputs):
        return False
    flat = positions[0].mT.flatten()
    return int(flat[0]) == 0 and bool((flat[1:] - flat[:-1] == 1).all())


def _read(flat: Tensor, step: _Ready) -> Tensor:
    """``flat[positions]``, without looking up places one by one where they lie in order."""
    positions = step.positions
    if not step.whole:
        return flat[positions]
    return flat.view(positions.shape[2], positions.shape[1]).mT.contiguous()[None]


def _write(flat: Tensor, step: _Ready, values: Tensor) -> None:
    """``flat[positions] = values``, likewise."""
    positions = step.positions
    if step.whole:
        flat.view(positions.shape[2], positions.shape[1]).copy_(values[0].mT)
    else:
        flat[positions] = values


def _block_budgets(
    layer: Layer,
    number: int,
    steps: list[_Ready],
    may_stay: list[Tensor],
    pattern: Granularity,
    block: int,
) -> list[int]:
    """Split a layer's number of weights over its blocks of inputs, and the weights without inputs."""
    flat = layer.mask.view(-1)
    room, live = [], []
    for step, mask in zip(steps, may_stay, strict=True):
        for first in range(0, step.positions.shape[1], block):
            within = mask[:, first : first + block]
            room.append(pattern.room({"": _rows(within)})[""])
            live.append(int((within & ~step.dead[:, first : first + block, None]).sum()))
    if len(layer.unseen):
        room.append(int(flat[layer.unseen].sum()))
        live.append(room[-1])
    weights = {str(i): max(float(n), 1e-6) for i, n in enumerate(live)}
    return list(apportion(number, weights, {str(i): n for i, n in enumerate(room)}).values())


def _chooser(name: str, within: Tensor, dead: Tensor, pattern: Granularity, numbers: object) -> Chooser:
    def choose(first: int, last: int, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(dead[:, first:last, None], 0.0)
        best = _best(name, _rows(scores), _rows(within[:, first:last]), pattern, next(numbers))  # type: ignore[call-overload]
        parts, _, outputs = scores.shape
        return best.view(parts, outputs, -1).mT

    return choose


def _rows(x: Tensor) -> Tensor:
    """(parts, inputs, outputs) as (parts * outputs, inputs)."""
    return x.mT.flatten(0, 1)


def _best(name: str, scores: Tensor, within: Tensor, pattern: Granularity, number: int) -> Tensor:
    """The ``number`` highest scores of a block; all that the pattern leaves, where that is the number."""
    if pattern == WEIGHT and is_full(within):
        return best_of_lines(scores.reshape(1, -1), number).view_as(scores)
    bundle = pattern.bundles({name: scores}, {name: within})[0]
    candidates = bundle.scores.view_as(scores) > NEVER
    if number == int(candidates.sum()):
        return candidates
    if not number:
        return torch.zeros_like(within)
    budget = Budget(number, {name: scores.numel()})
    return select({name: scores}, budget, within={name: within}, granularity=pattern, method=name)[name]
