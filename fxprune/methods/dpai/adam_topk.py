"""Adam on the scores of an exact top-k: masks that climb an objective.

A reading of the network and initial scores come in; masks that meet a budget at every step go out. Only
magnitudes of scores matter, and only rise, so that one number per unit is all the state that Adam needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Field, Figures, Reading
from fxprune.methods.dpai.topk_state import (
    Contest,
    Listed,
    Rule,
    Selection,
    Singles,
    contest_of,
    gathered,
    is_sparse,
)
from fxprune.sparsity.masks import Masks

__all__ = ["Ascent"]

BETAS, EPSILON = (0.9, 0.999), 1e-8
LEAP = (1 - BETAS[0]) / math.sqrt((1 - BETAS[1]) * (1 - BETAS[0] ** 2 / BETAS[1]))
"""No step of Adam is longer, in learning rates: Cauchy and Schwarz on its two means of the same gradients."""
GROUPED = 1 << 19
"""Scores that one contest handles together, where layers are small."""
TIDY = 64
"""Steps between two removals of what has all but decayed."""


class Ascent:
    """``magnitudes``: |s| of every weight, by layer, in the parameter's shape; -inf where it may not be kept.

    They are taken over, and may change. ``budget``: weights to keep in every layer. ``lr``: how far a score
    goes in a step, about. ``rule``: how the best are found.
    """

    def __init__(
        self,
        reading: Reading,
        magnitudes: Mapping[str, Tensor],
        budget: Mapping[str, int],
        lr: float,
        rule: Rule = contest_of,
    ) -> None:
        self.reading, self.lr, self.time = reading, lr, 0
        self.shapes = {name: score.shape for name, score in magnitudes.items()}
        units = {name: score.reshape(-1, reading.widths[name]) for name, score in magnitudes.items()}
        sizes = {name: len(unit) for name, unit in units.items()}
        self.contests: list[Contest | Listed | Singles | Selection] = []
        self.fields: list[Field] = []
        self.moments: list[tuple[Tensor, Tensor]] = []
        # Groups of weights may span layers, so that all layers are one contest then.
        together = gathered(reading.widths, sizes, GROUPED) if rule is contest_of else [list(units)]
        for names in together:
            own = {name: units[name] for name in names}
            is_listed = self._is_listed(names, sizes, budget)
            contest = Listed(own, budget, LEAP * lr) if is_listed else rule(own, budget)
            size = len(contest.rise)
            where = {name: contest.segment(name) for name in names}
            counts = torch.zeros(0 if isinstance(contest, Listed) else size, dtype=reading.dtype)
            self.contests.append(contest)
            self.fields.append(Field(counts, where))
            self.moments.append((torch.zeros(size), torch.zeros(size)))
        self._clock = torch.zeros(())
        self.initial = {name: unit for name, unit in units.items() if unit.shape[1] > 1}
        self._recount()
        reading.attach(self.fields)

    def _is_listed(self, names: list[str], sizes: Mapping[str, int], budget: Mapping[str, int]) -> bool:
        return (
            len(names) == 1
            and names[0] in self.reading.listable
            and is_sparse(sizes[names[0]], budget[names[0]])
        )

    def figures(self) -> Figures:
        """ln R_P, nodes and kernels of the present masks."""
        self.reading.climb()
        return self.reading.figures()

    def resize(self, budget: Mapping[str, int]) -> None:
        """Another number of weights in every layer."""
        for contest in self.contests:
            contest.resize(budget)
        self._recount()

    def step(self) -> float:
        """One step of Adam; returns ln R_P before it."""
        log_paths = self.reading.climb()
        self._advance()
        return log_paths

    def measured_step(self) -> Figures:
        """One step of Adam; returns ln R_P, nodes and kernels before it."""
        self.reading.climb()
        figures = self.reading.figures()
        self._advance()
        return figures

    def _advance(self) -> None:
        self.time += 1
        self._clock.fill_(self.time)
        for place, (contest, field, (mean, square)) in enumerate(
            zip(self.contests, self.fields, self.moments, strict=True)
        ):
            is_moderate = self.reading.is_moderate(place)
            for block, part in enumerate(self.reading.blocks(place)):
                direction = self.reading.direction(place, block)
                if not is_moderate:
                    direction.clamp_(max=LARGEST)
                    torch.threshold_(direction, SMALLEST, 0.0)
                self._adam(direction, contest.rise[part], mean[part], square[part])
                if isinstance(contest, Listed):
                    contest.look(part)
            if isinstance(contest, Listed):
                if contest.settle():
                    field.kept = torch.from_numpy(contest.kept)
                continue
            changed = contest.settle()
            if len(changed):
                field.counts.numpy()[changed] = contest.counts[changed]

    def masks(self) -> Masks:
        """The present masks."""
        found: Masks = {}
        for contest, field in zip(self.contests, self.fields, strict=True):
            for name, where in field.where.items():
                if isinstance(contest, Listed):
                    mask = torch.zeros(self.shapes[name], dtype=torch.bool)
                    mask.view(-1)[torch.from_numpy(contest.kept)] = True
                    found[name] = mask
                    continue
                kept = torch.from_numpy(contest.counts[where]).unsqueeze(1)
                if name not in self.initial:
                    found[name] = (kept > 0).view(self.shapes[name])
                    continue
                order = self.initial[name].argsort(dim=1, descending=True, stable=True)
                best = torch.arange(order.shape[1]) < kept
                found[name] = torch.zeros_like(best).scatter_(1, order, best).view(self.shapes[name])
        return found

    def _recount(self) -> None:
        for contest, field in zip(self.contests, self.fields, strict=True):
            if isinstance(contest, Listed):
                field.kept = torch.from_numpy(contest.kept)
            else:
                field.counts.copy_(torch.from_numpy(contest.counts))

    def _adam(self, direction: Tensor, rise: Tensor, mean: Tensor, square: Tensor) -> None:
        """Kingma, Ba 2015, algorithm 1, upwards, in the one pass of torch's own optimiser."""
        torch._fused_adam_(
            [rise], [direction], [mean], [square], [], [self._clock],
            lr=-self.lr, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON,
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
        if self.time % TIDY == 0:
            torch.threshold_(mean, SMALLEST**2, 0.0)
            torch.threshold_(square, SMALLEST**2 / 1e6, 0.0)
