"""Select channel groups, each of which holds rows and columns of several parameters.

What a group costs depends on which others are gone, so groups are ranked once and then removed from the
lowest score on, until the weights that are left fit the budget; they are counted exactly, rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxprune.channels.groups import Groups
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import NEVER, Bundle, Channel
from fxprune.sparsity.masks import Masks, kept

__all__ = ["ChannelGroups"]


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Whole channel groups of the ``prunable`` parameters of a graph, with the options of a `Channel`."""

    groups: Groups
    prunable: tuple[str, ...]
    options: Channel = field(default_factory=Channel)

    def __str__(self) -> str:
        return str(self.options)

    def bundles(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[Bundle]:
        """One bundle for all groups together, each with the weights of its rows and columns."""
        pooled, alive = self.pool(scores, masks)
        sizes = self._sizes(masks)

        def spread(chosen: Tensor) -> Masks:
            return {name: self.groups.kept(name, chosen) & mask for name, mask in masks.items()}

        return [Bundle(tuple(masks), pooled.where(alive, NEVER), sizes, spread)]

    def room(self, masks: Mapping[str, Tensor]) -> dict[str, int]:
        """All that is left."""
        return kept(masks)

    def pool(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return one score for every group, and which groups still have weights (bool).

        The scores of all weights in the group's rows and columns that ``masks`` keep are pooled.
        """
        shape = (self.groups.count,)
        total = torch.zeros(shape, dtype=torch.float64)
        number = torch.zeros(shape, dtype=torch.float64)
        power = 2 if self.options.pool == "l2" else 1
        how = "amax" if self.options.pool == "max" else "sum"
        if how == "amax":
            total.fill_(NEVER)
        for name, score in scores.items():
            values = score.detach().to(torch.float64).where(masks[name], NEVER if how == "amax" else 0.0)
            values = values**power
            matrix = values.flatten(2).amax(2) if how == "amax" and values.dim() > 2 else values
            matrix = matrix.flatten(2).sum(2) if matrix.dim() > 2 else matrix
            counts = masks[name].flatten(2).sum(2) if masks[name].dim() > 2 else masks[name].long()
            for numbers in self.groups.by_weight(name):
                index = numbers.reshape(numbers.shape[:2])
                self._add(total, number, index, matrix.cpu(), counts.cpu(), how)
        if self.options.pool == "mean":
            total = total / number.clamp(min=1)
        elif self.options.pool == "l2":
            total = total.sqrt()
        limit = torch.finfo(torch.float64).max
        return total.clamp(-limit, limit), number > 0

    @staticmethod
    def _add(total: Tensor, number: Tensor, index: Tensor, values: Tensor, counts: Tensor, how: str) -> None:
        """Add the kernels of one parameter to their groups, along the axis on which groups differ."""
        for axis in (0, 1):
            if bool((index == index.narrow(1 - axis, 0, 1)).all()):
                index = index.narrow(1 - axis, 0, 1).flatten()
                values = values.amax(1 - axis) if how == "amax" else values.sum(1 - axis)
                counts = counts.sum(1 - axis)
                break
        member = index >= 0
        index, values, counts = index[member], values[member], counts[member]
        if how == "amax":
            total.scatter_reduce_(0, index, values, "amax")
        else:
            total.index_add_(0, index, values)
        number.index_add_(0, index, counts.double())

    def _sizes(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The weights in the rows of every group."""
        sizes = torch.zeros(self.groups.count, dtype=torch.int64)
        for name, mask in masks.items():
            by_row = self.groups.by_weight(name)[0]
            index = by_row.expand(mask.shape[:2] + by_row.shape[2:]).reshape(mask.shape[:2])
            counts = mask.flatten(2).sum(2).cpu() if mask.dim() > 2 else mask.long().cpu()
            sizes.index_add_(0, index[index >= 0], counts[index >= 0])
        return sizes

    # -- choice -------------------------------------------------------------------------------------------
    def choose(self, scores: Mapping[str, Tensor], budget: Budget, within: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the groups that stay, with at most ``budget.total`` weights.

        One group more would exceed the budget. The best group of every parameter's outputs and inputs stays,
        so that no layer is emptied. Under a budget with a number for every layer, each family of tied layers
        removes its lowest groups in proportion.
        """
        pooled, alive = self.pool(scores, within)
        order = self._order(pooled, alive & ~self._protected(pooled, alive), budget)
        counter = _Counter(self.groups, within)
        low, high = 0, len(order)
        least = counter.count(self._staying(alive, order))
        if least > budget.total:
            raise ValueError(
                f"granularity {self}: {budget.total} weights are to be kept, but at least {least} must stay: "
                "every layer keeps one channel, and outputs, excluded layers and what meets them keep all; "
                "ask for a lower sparsity"
            )
        while low < high:
            middle = (low + high) // 2
            if counter.count(self._staying(alive, order[:middle])) <= budget.total:
                high = middle
            else:
                low = middle + 1
        staying = self._staying(alive, order[:low])
        return {name: self.groups.kept(name, staying).to(mask.device) & mask for name, mask in within.items()}

    def _staying(self, alive: Tensor, removed: Tensor) -> Tensor:
        staying = alive.clone()
        staying[removed] = False
        return staying

    def _protected(self, pooled: Tensor, alive: Tensor) -> Tensor:
        """The best group of the outputs and of the inputs of every parameter."""
        protected = torch.zeros_like(alive)
        ranked = pooled.where(alive, NEVER)
        for table in (self.groups.rows, self.groups.columns):
            for numbers in table.values():
                own = torch.unique(numbers[numbers >= 0])
                if len(own) and not bool((numbers < 0).any()):
                    protected[own[ranked[own].argmax()]] = True
        return protected

    def _order(self, pooled: Tensor, open_: Tensor, budget: Budget) -> Tensor:
        """The groups that may go, the first to go first; of equal ones the later group."""
        indices = open_.nonzero().flatten().flip(0)
        if budget.layers is None:
            return indices[pooled[indices].argsort(stable=True)]
        when = self._turns(pooled, budget)
        return indices[when[indices].argsort(stable=True)]

    def _turns(self, pooled: Tensor, budget: Budget) -> Tensor:
        """When each group goes, if every family loses its lowest groups in proportion to its budget.

        A family whose layers are to keep a fraction r of their weights keeps a fraction t r of its groups; t
        falls from 1/r on until the budget is met. The i-th lowest of n groups goes when t r < 1 - i / n.
        """
        assert budget.layers is not None
        when = torch.zeros_like(pooled)
        families = self.groups.families
        for family in torch.unique(families).tolist():
            members = (families == family).nonzero().flatten()
            names = [
                name for name in budget.layers if bool(torch.isin(self.groups.rows[name], members).any())
            ]
            size = sum(budget.sizes[name] for name in names)
            ratio = sum(budget.layers[name] for name in names) / size if size else 1.0
            ranks = pooled[members].argsort(stable=True).argsort(stable=True).double()
            when[members] = ratio / (1 - ranks / len(members)).clamp(min=1e-12)
        return when

    def shuffle(self, masks: Masks, order: Mapping[str, Tensor], within: Masks, per_family: bool) -> Masks:
        """Return masks that keep as many groups as ``masks`` do, the best by ``order``."""
        ones = {name: mask.double() for name, mask in masks.items()}
        pooled, alive = self.pool(order, within)
        kept_groups = self.pool(ones, within)[0] > 0
        families = self.groups.families if per_family else torch.zeros(self.groups.count, dtype=torch.int64)
        staying = torch.zeros_like(alive)
        for family in torch.unique(families).tolist():
            members = ((families == family) & alive).nonzero().flatten()
            number = int(kept_groups[members].sum())
            staying[members[pooled[members].argsort(descending=True, stable=True)[:number]]] = True
        return {name: self.groups.kept(name, staying).to(mask.device) & mask for name, mask in within.items()}


class _Counter:
    """Counts the weights that are left when some groups are gone."""

    def __init__(self, groups: Groups, within: Mapping[str, Tensor]) -> None:
        self.groups = groups
        self.parts = []
        for name, mask in within.items():
            counts = mask.flatten(2).sum(2) if mask.dim() > 2 else mask.long()
            by_row, by_column = groups.by_weight(name)
            shape = counts.shape
            rows = by_row.reshape(by_row.shape[:2])
            columns = by_column.reshape(by_column.shape[:2])
            self.parts.append((counts.cpu().double(), rows.expand(shape), columns.expand(shape)))

    def count(self, staying: Tensor) -> int:
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        total = 0.0
        for counts, rows, columns in self.parts:
            if bool((rows == rows[:, :1]).all()) and bool((columns == columns[:1]).all()):
                total += float(stays[rows[:, 0]] @ counts @ stays[columns[0]])
            else:
                total += float((stays[rows] * stays[columns] * counts).sum())
        return round(total)
