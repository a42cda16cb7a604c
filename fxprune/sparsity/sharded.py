"""Select weights of parameters that are split over processes, each of which sees its own rows only.

This is a variant of :func:`fxprune.sparsity.select.select`, tested equal to it on the whole parameters. The
score at which the budget runs out is found by bisection; processes exchange counts, never scores.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import NEVER, NM, WEIGHT, Bundle, Granularity
from fxprune.sparsity.masks import Masks, kept

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def select_sharded(
    scores: Mapping[str, torch.Tensor],
    budget: Budget,
    group: dist.ProcessGroup,
    *,
    within: Mapping[str, torch.Tensor],
    granularity: Granularity = WEIGHT,
    method: str = "scores",
) -> Masks:
    """Compute the local part of the masks that ``select`` gives for the whole parameters.

    ``scores``, ``within``: this process's rows (of the first dimension) of every parameter; processes hold
    consecutive rows in the order of their ranks in ``group``, some perhaps none. ``budget``: of the whole.
    Every process of the group has to call this with the same budget. Raises what ``select`` raises, on all
    processes alike, and ``ValueError`` for a granularity whose groups may lie in several processes.
    """
    if granularity != WEIGHT and not isinstance(granularity, NM):
        raise ValueError(
            f"granularity {granularity}: its groups may lie in several shards; prune before sharding"
        )
    _check(scores, budget, group, method)
    bundles = granularity.bundles({name: score.double() for name, score in scores.items()}, within)
    contests = _Contests(bundles, budget, group)
    return contests.masks()


@dataclass(frozen=True)
class _Contests:
    """Bundles that compete for the total, or one contest for every layer."""

    bundles: list[Bundle]
    budget: Budget
    group: dist.ProcessGroup

    @property
    def rooms(self) -> list[int]:
        layers = self.budget.layers
        return [self.budget.total] if layers is None else [layers[b.names[0]] for b in self.bundles]

    def masks(self) -> Masks:
        """The masks: all above the boundary of a contest, and of those at it as many as fit, by index."""
        rooms = self.rooms
        self._check_room(rooms)
        low, high = [_key(NEVER)] * len(rooms), [_key(math.inf)] * len(rooms)
        # At least ``room`` scores are at or above the key ``low``, less than ``room`` at or above ``high``.
        while any(top - bottom > 1 for bottom, top in zip(low, high, strict=True)):
            middle = [(bottom + top) // 2 for bottom, top in zip(low, high, strict=True)]
            counts = self._counts([_value(key) for key in middle])
            for i, (key, count) in enumerate(zip(middle, counts, strict=True)):
                if count >= rooms[i]:
                    low[i] = key
                else:
                    high[i] = key
        values = [_value(key) for key in low]
        left = [room - above for room, above in zip(rooms, self._counts(values, strictly=True), strict=True)]
        places = self._places_of_ties(values)
        masks: Masks = {}
        for i, bundle in enumerate(self.bundles):
            contest = self._contest(i)
            chosen = bundle.scores > values[contest]
            ties = (bundle.scores == values[contest]).nonzero().flatten()
            chosen[ties[: max(0, left[contest] - places[i])]] = True
            masks |= bundle.spread(chosen)
        return masks

    def _contest(self, bundle: int) -> int:
        return 0 if self.budget.layers is None else bundle

    def _counts(self, values: list[float], *, strictly: bool = False) -> list[int]:
        """For every contest, the number of scores at or above (or strictly above) its value, over all."""
        found = [0] * len(values)
        for i, bundle in enumerate(self.bundles):
            value = values[self._contest(i)]
            above = bundle.scores > value if strictly else bundle.scores >= value
            found[self._contest(i)] += int(above.count_nonzero())
        return summed(found, self.group)

    def _places_of_ties(self, values: list[float]) -> list[int]:
        """For every bundle, how many ties of its contest come before this process's first one."""
        own = [
            int((b.scores == values[self._contest(i)]).count_nonzero()) for i, b in enumerate(self.bundles)
        ]
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        table = torch.zeros(size, len(own), dtype=torch.int64)
        table[rank] = torch.tensor(own)
        everyone = torch.tensor(summed(table.flatten().tolist(), self.group)).view_as(table)
        in_layer = everyone[:rank].sum(0)
        layers = everyone.sum(0)
        before = layers.cumsum(0) - layers if self.budget.layers is None else torch.zeros_like(layers)
        places: list[int] = (before + in_layer).tolist()
        return places

    def _check_room(self, rooms: list[int]) -> None:
        available = self._counts([-math.inf] * len(rooms), strictly=True)
        for room, there in zip(rooms, available, strict=True):
            if there < room:
                raise ValueError(f"only {there} weights can be kept, {room} are asked for")


def summed(numbers: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """The sums over the processes of ``group``."""
    total = torch.tensor(numbers, dtype=torch.int64, device=_device_of(group))
    dist.all_reduce(total, group=group)
    found: list[int] = total.tolist()
    return found


def own_part(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This process's part of a tensor that every process has in full, split as ``like``; nothing travels."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    placed = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return placed.redistribute(mesh, like.placements).to_local()


def kept_overall(masks: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, int]:
    """``kept`` of masks, or of the whole ones where ``masks`` are a process's share."""
    own = kept(masks)
    return own if group is None else dict(zip(own, summed(list(own.values()), group), strict=True))


def _check(scores: Mapping[str, torch.Tensor], budget: Budget, group: dist.ProcessGroup, method: str) -> None:
    if scores.keys() != budget.sizes.keys():
        odd = sorted(scores.keys() ^ budget.sizes.keys())[0]
        raise ValueError(
            f"{method}: scores and prunable parameters differ at {odd!r}; give one tensor for each"
        )
    bad = [int(not bool(torch.isfinite(score).all())) for score in scores.values()]
    sizes = [score.numel() for score in scores.values()]
    everyone = summed([*bad, *sizes], group)
    for name, wrong, size in zip(scores, everyone, everyone[len(bad) :], strict=False):
        if wrong:
            raise ValueError(f"{method}: scores of {name!r} are not finite")
        if size != budget.sizes[name]:
            raise ValueError(f"{method}: {size} scores for the {budget.sizes[name]} weights of {name!r}")


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _key(value: float) -> int:
    """An integer for every float64, in the same order."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits if bits >= 0 else -(bits & 0x7FFFFFFFFFFFFFFF)


def _value(key: int) -> float:
    magnitude: float = struct.unpack("<d", struct.pack("<q", abs(key)))[0]
    return magnitude if key >= 0 else -magnitude
