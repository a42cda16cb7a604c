"""Select channel groups, each of which holds rows and columns of several parameters.

What a group costs depends on which others are gone. Groups are put in an order, and removed from its front
until what is left meets the budget; what is left is counted exactly, rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fxprune.channels.by_channel import any_by_channel, largest_by_channel, sums_by_channel
from fxprune.channels.cost import CostModel, count_macs, count_parameters, count_weights
from fxprune.channels.entries import entry_groups
from fxprune.channels.groups import Groups
from fxprune.channels.sums import added_up, multiplied
from fxprune.graph import KernelSet
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.by_name import value_for
from fxprune.sparsity.granularity import NEVER, Bundle, Channel, in_unit
from fxprune.sparsity.group_order import by_class, by_worth, kinds, round_up, turns
from fxprune.sparsity.masks import Masks, is_full, kept

__all__ = ["ChannelGroups", "Choice"]

Choice = tuple["ChannelGroups", Mapping[str, Tensor], Masks]
"""The groups with a method's own options, the scores that they were chosen by, and the masks within which."""

ROUNDING = 1e-12
"""The relative error of a cost that is a sum of numbers."""

Rounding = Callable[[Tensor, Tensor], Tensor]
"""Adds groups to those that stay, by rank, as `round_up` says."""


class OutOfReach(ValueError):
    """Say that a target cannot be met: ``share`` of the cost must stay, and ``why``."""

    def __init__(self, text: str, share: float, why: str) -> None:
        super().__init__(text)
        self.share, self.why = share, why


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Whole channel groups of the ``prunable`` parameters of a graph, with the options of a `Channel`.

    ``shapes``: those of all parameters of the network, by name, for ``of="params"``. ``counted``: the cost of
    a choice of groups, where ``options.of`` needs more than the graph says. ``seen``: notes choices.
    """

    groups: Groups
    prunable: tuple[str, ...]
    options: Channel = field(default_factory=Channel)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    counted: Callable[[Groups], CostModel] | None = None
    seen: list[Choice] | None = None

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
        pooled, number = self._pooled(scores, masks)
        return pooled, number > 0

    def _pooled(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One score for every group, and the number of its weights."""
        power = 2 if self.options.pool == "l2" else 1
        how = "amax" if self.options.pool == "max" else "sum"
        sides = 1 if self.options.sides == "rows" else 2
        nothing = torch.zeros(0, dtype=torch.float64)
        indices, values, numbers = [nothing.long()], [nothing], [nothing]
        for name, score in scores.items():
            kernels, mask = self.groups.graph.kernels[name], masks[name]
            part = None if is_full(mask) else mask
            if how == "amax":
                values += largest_by_channel(score, kernels, part, NEVER)
            else:
                values += sums_by_channel(score, kernels, part, power)
            numbers += _counts(mask, part, kernels)
            rows, columns = self.groups.rows[name], self.groups.columns[name]
            indices += [rows, columns if sides == 2 else columns.where(self._rowless[columns], -1)]
        index, value, count = torch.cat(indices), torch.cat(values), torch.cat(numbers)
        member = index >= 0
        index = index[member]
        number = torch.zeros(self.groups.count, dtype=torch.float64).index_add_(0, index, count[member])
        if how == "amax":
            total = torch.full_like(number, NEVER).scatter_reduce_(0, index, value[member], "amax")
        else:
            total = torch.zeros_like(number).index_add_(0, index, value[member])
        if self.options.pool == "mean":
            total = total / number.clamp(min=1)
        elif self.options.pool == "l2":
            total = total.sqrt()
        limit = torch.finfo(torch.float64).max
        total = total.clamp(-limit, limit)
        if self.options.normalize == "family":
            total = total / self._family_means(total, number > 0)
        return total, number

    @cached_property
    def _rowless(self) -> Tensor:
        """Mark the groups without output channels, as those of an embedding: their columns are scored."""
        found = torch.ones(self.groups.count + 1, dtype=torch.bool)
        for numbers in self.groups.rows.values():
            found[numbers] = False
        found[-1] = False
        return found

    def _family_means(self, pooled: Tensor, alive: Tensor) -> Tensor:
        """The mean absolute score over what is left of the family of every group; 1 where it is 0."""
        families = self.groups.families
        total = torch.zeros_like(pooled).index_add_(0, families, pooled.abs().where(alive, 0.0))
        number = torch.zeros_like(pooled).index_add_(0, families, alive.to(pooled))
        mean = (total / number.clamp(min=1))[families]
        return mean.where(mean > 0, 1.0)

    def present(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Mark the groups (bool) with any weight that ``masks`` keep."""
        found = torch.zeros(self.groups.count + 1, dtype=torch.bool)  # the last entry: what is in no group
        for name, mask in masks.items():
            sides = any_by_channel(mask, self.groups.graph.kernels[name])
            found[self.groups.rows[name][sides[0]]] = True
            read = self.groups.columns[name][sides[1]]
            found[read if self.options.sides != "rows" else read[self._rowless[read]]] = True
        return found[:-1]

    def _sizes(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The weights in the rows of every group."""
        sizes = torch.zeros(self.groups.count, dtype=torch.int64)
        for name, mask in masks.items():
            counts = sums_by_channel(mask, self.groups.graph.kernels[name])[0].long()
            index = self.groups.rows[name]
            sizes.index_add_(0, index[index >= 0], counts[index >= 0])
        return sizes

    # -- choice -------------------------------------------------------------------------------------------
    def choose(self, scores: Mapping[str, Tensor], budget: Budget, within: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the groups that stay, whose cost is at most the budget's share of the whole.

        One group more would exceed it. The best groups of every parameter's outputs and inputs stay, so that
        no layer is emptied. Under a budget with a number for every layer, each family of tied layers removes
        its lowest groups in proportion. Under ``scope="uniform"`` families as large as one another lose as
        many, by which the cost may be lower by more than a group.
        """
        if self.seen is not None:
            self.seen.append((replace(self, seen=None), scores, dict(within)))
        pooled, number = self._pooled(scores, within)
        alive = number > 0
        cost, limit = self.cost(within), self.limit(budget) * (1 + ROUNDING)
        rounded = round_up(self.groups, self.options.round_to) if self.options.round_to > 1 else None
        open_ = alive & ~self._protected(pooled, alive)
        least = cost.left(self._staying(alive, open_, pooled, rounded))
        if least > limit:
            raise self._out_of_reach(limit, least, cost.whole)
        if self._weighs_costs(budget):
            # What is rounded up stays above the limit; so the order must go on beyond it.
            order = by_worth(pooled * number, cost, alive, open_, limit if rounded is None else 0.0)
        else:
            order = self._order(pooled, open_, budget)
        rank = torch.full_like(pooled, float(len(order)))
        rank[order] = torch.arange(len(order), dtype=rank.dtype)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if cost.left(self._staying(alive, order[:middle], rank, rounded)) <= limit:
                high = middle
            else:
                low = middle + 1
        if self.options.scope == "uniform" and low:
            when = turns(pooled, self.groups.families, {})[order]
            low = int((when <= when[low - 1]).sum())  # all whose turn it is
        staying = self._staying(alive, order[:low], rank, rounded)
        return {
            name: self.groups.kept(name, staying).to(mask.device).logical_and_(mask)
            for name, mask in within.items()
        }

    def check_reach(self, scores: Mapping[str, Tensor], budget: Budget, within: Mapping[str, Tensor]) -> None:
        """``ValueError`` if by any scores even the fewest groups that can stay cost more than a budget."""
        # Training changes scores: so groups that are cheap, or shared by many layers, are tried too.
        limit, cost = self.limit(budget) * (1 + ROUNDING), self.cost(within)
        pooled, alive = self.pool(scores, within)
        cheap = -cost.towards(alive, limit)
        shared = torch.zeros_like(cheap)
        for numbers in (*self.groups.rows.values(), *self.groups.columns.values(), *multiplied(self.groups)):
            shared[torch.unique(numbers[numbers >= 0])] += 1
        some = (pooled, cheap, shared + cheap / (1 - cheap.sum()))
        least = min(self._least(one, alive, cost) for one in some)
        if least * (1 - ROUNDING) > limit:
            raise self._out_of_reach(limit, least, cost.whole)

    def most(self, scores: Mapping[str, Tensor], within: Mapping[str, Tensor]) -> float:
        """Return the highest sparsity that can be met by these scores."""
        cost = self.cost(within)
        return 1 - self._least(*self.pool(scores, within), cost) / cost.whole

    def _least(self, pooled: Tensor, alive: Tensor, cost: CostModel) -> float:
        """The cost of the fewest groups that can stay, the best by their scores."""
        rounded = round_up(self.groups, self.options.round_to) if self.options.round_to > 1 else None
        return cost.left(self._staying(alive, alive & ~self._protected(pooled, alive), pooled, rounded))

    def cost(self, within: Mapping[str, Tensor]) -> CostModel:
        """Count what the network costs, in the unit that ``options.of`` names."""
        return count_weights(self.groups, within) if self.options.of == "weights" else self._dense_cost

    @property
    def whole(self) -> float:
        """Give the cost of the network with all its groups, in the unit that ``options.of`` names."""
        if self.options.of == "weights":
            return sum(math.prod(self.shapes[name]) for name in self.prunable)
        return self._dense_cost.whole

    @cached_property
    def _dense_cost(self) -> CostModel:
        """The cost that no mask changes; every round asks for it."""
        if self.counted is not None:
            return self.counted(self.groups)
        if self.options.of in ("memory", "latency"):
            raise ValueError(
                f"of={self.options.of!r}: the cost was not counted; use fxprune.apply or a Pruner"
            )
        if self.options.of == "params":
            return count_parameters(self.groups, self.shapes)
        return count_macs(self.groups)

    def check(self, masks: Mapping[str, Tensor], budget: Budget, method: str) -> None:
        """``ValueError`` if ``masks`` cost more than ``budget`` allows."""
        # Every weight that is kept is in a group that stays.
        weighed = self.options.of != "weights"
        left = self._dense_cost.left(self.present(masks)) if weighed else float(sum(kept(masks).values()))
        limit = self.limit(budget)
        if left > limit * (1 + 1e-9):
            of = self.options.of
            raise ValueError(f"method {method!r} keeps {left:.0f} {of} in the model, not {limit:.0f}")

    def entries(self, masks: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Masks:
        """Return masks of biases, norms and tables of groups that ``masks`` leave nothing of.

        Only for parameters where it matters: no layer reads what a removed channel's bias still gives, but a
        norm over channels, a product of two values or a sum adds it to the others. ``shapes``: of the
        parameters that may be masked. Those of which nothing goes have no mask.
        """
        present = self.present(masks)
        stays = torch.cat([present, present.new_ones(1)])  # -1: what belongs to no group
        counts = torch.cat([added_up(self.groups), present.new_zeros(1)]) & ~stays
        found: Masks = {}
        for name, axes in entry_groups(self.groups, shapes).items():
            shape = tuple(shapes[name])
            left = torch.ones(shape, dtype=torch.bool)
            for axis, numbers in axes.items():
                left &= stays[numbers].view([-1 if other == axis else 1 for other in range(len(shape))])
            if any(bool(counts[numbers].any()) for numbers in axes.values()):
                found[name] = left
        return found

    def limit(self, budget: Budget) -> float:
        """The cost that a budget allows."""
        if self.options.of == "weights":
            return budget.total
        return self._dense_cost.whole * (budget.density if budget.asked is None else budget.asked)

    def _out_of_reach(self, limit: float, least: float, whole: float) -> OutOfReach:
        """Return an error that says which target is the lowest that can be met, and what holds it."""
        options = self.options
        held = [name for name, numbers in self.groups.rows.items() if bool((numbers < 0).all())]
        some = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        bounds = [
            f", or {name}={getattr(options, name)!r}"
            for name, default in (("round_to", 1), ("min_channels", 1), ("max_sparsity", 1.0))
            if getattr(options, name) != default
        ]
        more = "".join(bounds)
        reach = math.floor(1e4 * max(1 - least / whole, 0.0)) / 1e4
        remedy = f"ask for a sparsity of at most {reach:g}"
        if options.at_most is not None:
            enough = math.ceil(least) if least >= 100 else math.ceil(1e4 * least) / 1e4
            remedy = f"ask for at_most={enough} or more"
        elif reach == 0:
            remedy = "no channel can go" + (f"{more.replace(', or', ' under', 1)}" if more else "")
        must = in_unit(least, options.of).split()[0] + (", as predicted," if options.of == "latency" else "")
        why = (
            f"every layer keeps one channel{more}, and outputs, excluded layers and what meets them "
            f"keep all ({some or 'none here'})"
        )
        text = f"{in_unit(limit, options.of)} are to be kept, but at least {must} must stay: {why}; {remedy}"
        return OutOfReach(f"granularity {self}: {text}", least / whole, why)

    @staticmethod
    def _staying(alive: Tensor, removed: Tensor, rank: Tensor, rounded: Rounding | None) -> Tensor:
        staying = alive.clone()
        staying[removed] = False
        return staying if rounded is None else rounded(staying, rank) & alive

    def _protected(self, pooled: Tensor, alive: Tensor) -> Tensor:
        """The best groups of every parameter's outputs and inputs, and of what products of two values read.

        As many as must stay: queries and keys of one packed projection are no outputs of their own.
        """
        protected = torch.zeros_like(alive)
        ranked = pooled.where(alive, NEVER)
        number, share = self.options.min_channels, self.options.max_sparsity
        # Numbers by layer are those of its outputs.
        usual = 1 if isinstance(number, Mapping) else number, 1.0 if isinstance(share, Mapping) else share
        sides = [
            (numbers, value_for(name, number, 1), value_for(name, share, 1.0))
            for name, numbers in self.groups.rows.items()
        ]
        others = (*self.groups.columns.values(), *multiplied(self.groups))
        for numbers, fewest, lost in [*sides, *((numbers, *usual) for numbers in others)]:
            own = torch.unique(numbers[numbers >= 0])
            fixed = int((numbers < 0).sum())
            channels = max(fewest, math.ceil((1 - lost) * len(numbers) - 1e-9)) - fixed
            least = math.ceil(channels * len(own) / max(len(numbers) - fixed, 1))
            if least > 0:
                best = own[ranked[own].argsort(descending=True, stable=True)[:least]]
                protected[best] = True
        return protected

    def _weighs_costs(self, budget: Budget) -> bool:
        """Whether groups are ranked by the sum of their scores per cost, not by their scores alone.

        A mean over weights is a sum per cost already, where the cost is the number of weights.
        """
        free = budget.layers is None and self.options.scope == "global"
        return free and self.options.of != "weights" and self.options.pool == "mean"

    def _order(self, pooled: Tensor, open_: Tensor, budget: Budget) -> Tensor:
        """The groups that may go, the first to go first; of equal ones the later group."""
        if budget.layers is not None:
            return by_class(pooled, self.groups.families, self._ratios(budget), open_)
        if self.options.scope in ("layer", "uniform"):
            return by_class(pooled, self.groups.families, {}, open_)
        if self.options.scope == "isomorphic":
            return by_class(pooled, kinds(self.groups), {}, open_)
        indices = open_.nonzero().flatten().flip(0)
        return indices[pooled[indices].argsort(stable=True)]

    def _ratios(self, budget: Budget) -> dict[int, float]:
        """The density that a budget by layer gives every family of tied layers."""
        assert budget.layers is not None
        ratios = {}
        for family in torch.unique(self.groups.families).tolist():
            members = (self.groups.families == family).nonzero().flatten()
            names = [
                name for name in budget.layers if bool(torch.isin(self.groups.rows[name], members).any())
            ]
            size = sum(budget.sizes[name] for name in names)
            if size:
                ratios[family] = sum(budget.layers[name] for name in names) / size
        return ratios

    def shuffle(self, masks: Masks, order: Mapping[str, Tensor], within: Masks, per_family: bool) -> Masks:
        """Return masks that keep as many groups as ``masks`` do, the best by ``order``."""
        pooled, alive = self.pool(order, within)
        ones = {name: mask.double() for name, mask in masks.items()}
        kept_groups = self.pool(ones, within)[0] > 0
        families = self.groups.families if per_family else torch.zeros(self.groups.count, dtype=torch.int64)
        staying = torch.zeros_like(alive)
        for family in torch.unique(families).tolist():
            members = ((families == family) & alive).nonzero().flatten()
            number = int(kept_groups[members].sum())
            staying[members[pooled[members].argsort(descending=True, stable=True)[:number]]] = True
        return {name: self.groups.kept(name, staying).to(mask.device) & mask for name, mask in within.items()}


def _counts(mask: Tensor, part: Tensor | None, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """The number of weights of every output and input channel; ``part``: the mask, unless it is full."""
    if part is not None:
        return sums_by_channel(mask, kernels)
    outputs, inputs = kernels.outputs, kernels.inputs
    weights = mask.numel()
    return (
        torch.full((outputs,), weights / outputs, dtype=torch.float64),
        torch.full((inputs,), weights / inputs, dtype=torch.float64),
    )
