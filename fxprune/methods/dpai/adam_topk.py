"""Run Adam on scores whose exact top-k, layer by layer, are the masks.

The straight-through gradient of a signed score s is sign(s) times that of the mask, which is not negative. So
|s|, which decides about the mask, never falls, and its changes are the same for all weights of a unit: |s| at
the start, and the *rise* of every unit since, are all the state besides Adam's two means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.methods.dpai.layer_topk import IndexTopK, MaskTopK, keeps_few
from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Figures, ScoreGradients, UnitGroup
from fxprune.methods.dpai.topk_state import GranularTopK, MakeTopK, UnitTopK, group_layers, make_topk
from fxprune.sparsity.masks import Masks
from fxprune.torch_private import fused_adam_

__all__ = ["Ascent"]

BETAS, EPSILON = (0.9, 0.999), 1e-8
LONGEST_STEP = (1 - BETAS[0]) / math.sqrt((1 - BETAS[1]) * (1 - BETAS[0] ** 2 / BETAS[1]))
"""A bound on Adam's steps, in learning rates: Cauchy and Schwarz on its two means of the same gradients."""
GROUP_ENTRIES = 1 << 19
"""Scores of small layers that one top-k state handles together."""
FLUSH_EVERY = 64
"""Steps after which means that have all but decayed are set to zero; subnormal numbers are slow."""

TopK = UnitTopK | IndexTopK | MaskTopK | GranularTopK


class Ascent:
    """Increase an objective by Adam on scores, with masks that meet the budget after every step.

    ``magnitudes``: |s| of every weight, by layer, in the parameter's shape; ``-inf`` where a weight may not
    be kept. These tensors are taken over, and may change. ``budget``: weights to keep in every layer. ``lr``:
    Adam's learning rate. ``make``: makes the top-k states.
    """

    def __init__(
        self,
        gradients: ScoreGradients,
        magnitudes: Mapping[str, Tensor],
        budget: Mapping[str, int],
        lr: float,
        make: MakeTopK = make_topk,
    ) -> None:
        self.gradients, self.lr, self.time = gradients, lr, 0
        self.shapes = {name: score.shape for name, score in magnitudes.items()}
        scores = {name: score.reshape(-1, gradients.widths[name]) for name, score in magnitudes.items()}
        sizes = {name: len(units) for name, units in scores.items()}
        self.states: list[TopK] = []
        self.groups: list[UnitGroup] = []
        self.moments: list[tuple[Tensor, Tensor]] = []
        # Groups of weights may span layers: all layers have one state then.
        is_default = make is make_topk
        for names in group_layers(gradients.widths, sizes, GROUP_ENTRIES) if is_default else [list(scores)]:
            own = {name: scores[name] for name in names}
            is_indexed = self._is_indexed(names, sizes, budget)
            state = IndexTopK(own, budget, LONGEST_STEP * lr) if is_indexed else make(own, budget)
            size = len(state.rise)
            units = {name: state.units_of(name) for name in names}
            counts = torch.zeros(0 if isinstance(state, IndexTopK) else size, dtype=gradients.dtype)
            self.states.append(state)
            self.groups.append(UnitGroup(counts, units))
            self.moments.append((torch.zeros(size), torch.zeros(size)))
        self._clock = torch.zeros(())
        # Which weights of a unit are kept follows from the order of their initial scores.
        self._initial = {name: units for name, units in scores.items() if units.shape[1] > 1}
        self._copy_masks()
        gradients.attach(self.groups)

    def _is_indexed(self, names: list[str], sizes: Mapping[str, int], budget: Mapping[str, int]) -> bool:
        return (
            len(names) == 1
            and names[0] in self.gradients.indexable
            and keeps_few(sizes[names[0]], budget[names[0]])
        )

    def figures(self) -> Figures:
        """Return ln R_P, nodes and kernels of the present masks."""
        self.gradients.evaluate()
        return self.gradients.figures()

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Keep another number of weights in every layer."""
        for state in self.states:
            state.set_budget(budget)
        self._copy_masks()

    def step(self) -> float:
        """Make one step of Adam; return ln R_P before it."""
        log_paths = self.gradients.evaluate()
        self._advance()
        return log_paths

    def measured_step(self) -> Figures:
        """Make one step of Adam; return ln R_P, nodes and kernels before it."""
        self.gradients.evaluate()
        figures = self.gradients.figures()
        self._advance()
        return figures

    def masks(self) -> Masks:
        """Return the present masks."""
        masks: Masks = {}
        for state, group in zip(self.states, self.groups, strict=True):
            for name, units in group.units.items():
                if isinstance(state, IndexTopK):
                    masks[name] = torch.zeros(self.shapes[name], dtype=torch.bool)
                    masks[name].view(-1)[torch.from_numpy(state.kept)] = True
                    continue
                counts = torch.from_numpy(state.counts[units]).unsqueeze(1)
                if name not in self._initial:
                    masks[name] = (counts > 0).view(self.shapes[name])
                    continue
                order = self._initial[name].argsort(dim=1, descending=True, stable=True)
                is_kept = torch.arange(order.shape[1]) < counts  # by rank in the unit
                masks[name] = torch.zeros_like(is_kept).scatter_(1, order, is_kept).view(self.shapes[name])
        return masks

    def _advance(self) -> None:
        """Move the scores along the gradient, block by block, and update the masks."""
        self.time += 1
        self._clock.fill_(self.time)
        for place, (state, group) in enumerate(zip(self.states, self.groups, strict=True)):
            mean, square = self.moments[place]
            is_in_range = self.gradients.is_in_range(place)
            for block, part in enumerate(self.gradients.blocks(place)):
                gradient = self.gradients.gradient(place, block)
                if not is_in_range:
                    gradient.clamp_(max=LARGEST)
                    torch.threshold_(gradient, SMALLEST, 0.0)
                self._adam(gradient, state.rise[part], mean[part], square[part])
                if isinstance(state, IndexTopK):
                    state.scan(part)
            if isinstance(state, IndexTopK):
                if state.update():
                    group.kept = torch.from_numpy(state.kept)
                continue
            changed = state.update()
            if len(changed):
                group.counts.numpy()[changed] = state.counts[changed]

    def _copy_masks(self) -> None:
        """Hand the masks of all states to the gradients."""
        for state, group in zip(self.states, self.groups, strict=True):
            if isinstance(state, IndexTopK):
                group.kept = torch.from_numpy(state.kept)
            else:
                group.counts.copy_(torch.from_numpy(state.counts))

    def _adam(self, gradient: Tensor, rise: Tensor, mean: Tensor, square: Tensor) -> None:
        """Update ``rise`` upwards (Kingma, Ba 2015, algorithm 1), in the one pass of torch's optimiser."""
        fused_adam_(
            [rise], [gradient], [mean], [square], [], [self._clock],
            lr=-self.lr, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON,
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
        if self.time % FLUSH_EVERY == 0:
            torch.threshold_(mean, SMALLEST**2, 0.0)
            torch.threshold_(square, SMALLEST**2 / 1e6, 0.0)
