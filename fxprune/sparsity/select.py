"""Select: which weights to keep, given a score for each and a budget.

Exact and stable: groups are taken by descending score, ties by ascending index (layers in the order of the
scores, groups in the order of the flattened parameter), each that still fits, until the budget is spent. With
groups of one weight that is precisely ``budget.total`` weights. Nothing is sorted but a small sample and the
few scores near the threshold; scores are copied once where some weights are pruned already, else not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import NEVER, WEIGHT, Bundle, Granularity
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks, dense, integers, is_empty, number_kept

_SAMPLE = 1 << 17
_ATTEMPTS = 3


def select(
    scores: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    within: Mapping[str, torch.Tensor] | None = None,
    granularity: Granularity = WEIGHT,
    method: str = "scores",
) -> Masks:
    """Masks of the highest ``scores``, keeping what ``budget`` says, overall or in every layer.

    ``scores``: name -> tensor of the parameter's shape, higher = keep, finite. ``within``: only weights that
    these masks keep may be kept. ``method``: what error messages call the origin of the scores. Where whole
    groups cannot meet the budget, the result stays below it by less than the smallest group left out.
    Raises ``ValueError`` for scores that are NaN or infinite, do not fit the budget's layers, or for a budget
    that the candidates cannot meet or that is smaller than the smallest group.

    >>> budget = Budget(total=2, sizes={"a": 3, "b": 1})
    >>> select({"a": torch.tensor([[1.0, 2.0, 1.0]]), "b": torch.tensor([[1.0]])}, budget)
    {'a': tensor([[ True,  True, False]]), 'b': tensor([[False]])}
    """
    check_scores(scores, budget, method)
    wide = any(score.dtype == torch.float64 or not score.is_floating_point() for score in scores.values())
    dtype = torch.float64 if wide else torch.float32
    masks = dense(scores) if within is None else within
    if isinstance(granularity, ChannelGroups):
        return granularity.choose(scores, budget, masks)
    bundles = granularity.bundles({name: score.detach().to(dtype) for name, score in scores.items()}, masks)
    chosen: Masks = {}
    for group, room in _contests(bundles, budget):
        for bundle, kept in zip(group, _take(group, room, granularity), strict=True):
            chosen |= bundle.spread(kept)
    if budget.total and all(map(is_empty, chosen.values())):
        raise ValueError(
            f"a budget of {budget.total} weights is smaller than the smallest group of {granularity}: "
            "ask for a lower sparsity or a finer granularity"
        )
    return {name: chosen[name].contiguous() for name in scores}


def check_scores(scores: Mapping[str, torch.Tensor], budget: Budget, method: str) -> None:
    """``ValueError`` unless there is a finite score for every weight that the budget counts."""
    if scores.keys() != budget.sizes.keys():
        odd = sorted(scores.keys() ^ budget.sizes.keys())[0]
        raise ValueError(
            f"{method}: scores and prunable parameters differ at {odd!r}; give one tensor for each"
        )
    extremes = []
    for name, score in scores.items():
        if not isinstance(score, torch.Tensor):
            kind = type(score).__name__
            raise TypeError(
                f"{method}: scores of {name!r} are a {kind}, expected a tensor of the weights' shape"
            )
        if score.numel() != budget.sizes[name]:
            raise ValueError(
                f"{method}: {score.numel()} scores for the {budget.sizes[name]} weights of {name!r}"
            )
        low, high = score.detach().aminmax()  # one pass, and NaN comes through
        extremes.append(torch.stack([low, high]).double())
    extremes = [pair.to(extremes[0].device) for pair in extremes]
    for name, (low, high) in zip(scores, torch.stack(extremes).tolist(), strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{method}: scores of {name!r} are not finite (from {low} to {high})")


def _contests(bundles: Sequence[Bundle], budget: Budget) -> list[tuple[list[Bundle], int]]:
    """Return the bundles that compete with one another, and for how many weights."""
    if budget.layers is None:
        return [(list(bundles), budget.total)]
    tied = next((bundle.names for bundle in bundles if len(bundle.names) > 1), None)
    if tied is not None:
        raise ValueError(f"{tied[0]!r} and {tied[1]!r} are pruned together: use budget='global'")
    return [([bundle], budget.layers[bundle.names[0]]) for bundle in bundles]


def _take(bundles: Sequence[Bundle], room: int, granularity: Granularity) -> list[torch.Tensor]:
    """For each bundle, which of its groups fit into ``room`` weights when taken in order of score."""
    taken: list[torch.Tensor] = []  # made when there is something to note: one byte per weight counts
    sizes = [bundle.sizes for bundle in bundles]
    candidates = [bundle.scores for bundle in bundles]
    available = _mass((scores > NEVER for scores in candidates), sizes)
    if available < room:
        raise ValueError(f"only {available} weights can be kept under {granularity}, {room} are asked for")
    spent = 0
    while room:
        # The longest run of candidates, in order, that fits. Only unequal groups can leave room after it,
        # and then the next run is made of what is small enough for that room.
        candidates = [
            scores
            if not spent and isinstance(size, int) and size <= room
            else scores.where(_open(size, room, taken[place] if taken else None), NEVER)
            for place, (scores, size) in enumerate(zip(candidates, sizes, strict=True))
        ]
        run = _run(candidates, sizes, room)
        spent = _mass(run, sizes)
        if not spent:
            break
        if taken:
            for done, new in zip(taken, run, strict=True):
                done |= new
        else:
            taken = run
        room -= spent
    return taken or [torch.zeros_like(bundle.scores, dtype=torch.bool) for bundle in bundles]


def _open(size: int | torch.Tensor, room: int, done: torch.Tensor | None) -> torch.Tensor:
    """Mark the groups that fit into ``room`` and are not taken yet."""
    fits = torch.as_tensor(size) <= room
    return fits if done is None else fits & ~done


def _run(
    scores: Sequence[torch.Tensor], sizes: Sequence[int | torch.Tensor], room: int
) -> list[torch.Tensor]:
    """The first candidates, by descending score and ascending index, whose sizes sum to at most ``room``."""
    available = _mass((values > NEVER for values in scores), sizes)
    if available <= room:
        return [values > NEVER for values in scores]
    boundary = _find_boundary(scores, sizes, room, available)
    if boundary.above + boundary.equal == room:
        return [values >= boundary.value for values in scores]
    run = [values > boundary.value for values in scores]
    left = room - boundary.above
    for values, size, chosen in zip(scores, sizes, run, strict=True):
        index = (values == boundary.value).nonzero().flatten()
        if isinstance(size, int):
            fitting = index[: left // size]
            left -= len(fitting) * size
        else:
            masses = size[index].cumsum(0)
            fitting = index[masses <= left]
            left -= int(masses[len(fitting) - 1]) if len(fitting) else 0
        chosen[fitting] = True
        if len(fitting) < len(index) or not left:
            break
    return run


@dataclass(frozen=True)
class _Boundary:
    """The score at which the room runs out, and the weights in groups above it and at it."""

    value: float
    above: int
    equal: int


def _find_boundary(
    scores: Sequence[torch.Tensor], sizes: Sequence[int | torch.Tensor], room: int, available: int
) -> _Boundary:
    """The score v with: groups above v hold less than ``room`` weights, together with those at v not less.

    A sorted sample guesses a bracket around v, exact counts correct it, and only what lies strictly inside is
    sorted. Throughout, v is in the open interval (low, high); ``above_low`` and ``from_high`` are the weights
    in groups scored above the one and at least the other.
    """
    low, above_low, high, from_high = -math.inf, available, math.inf, 0
    for _ in range(_ATTEMPTS):
        share = (room - from_high) / (above_low - from_high)
        under, over = _bracket(scores, sizes, share, low, high)
        if over < high:
            at_least = _mass((values >= over for values in scores), sizes)
            if at_least >= room:
                more = _mass((values > over for values in scores), sizes)
                if more < room:
                    return _Boundary(over, more, at_least - more)
                low, above_low = over, more
                continue
            high, from_high = over, at_least
        if under > low:
            more = _mass((values > under for values in scores), sizes)
            if more < room:
                at_least = _mass((values >= under for values in scores), sizes)
                if at_least >= room:
                    return _Boundary(under, more, at_least - more)
                high, from_high = under, at_least
                continue
            low, above_low = under, more
        break
    return _boundary_inside(scores, sizes, room - from_high, low, high, from_high)


def _bracket(
    scores: Sequence[torch.Tensor], sizes: Sequence[int | torch.Tensor], share: float, low: float, high: float
) -> tuple[float, float]:
    """Two scores that likely enclose the boundary at ``share`` of the weights from ``low`` to ``high``."""
    stride = sample_stride(sum(values.numel() for values in scores), _SAMPLE)
    some = [size if isinstance(size, int) else size[::stride] for size in sizes]
    values, masses = _flat([values[::stride] for values in scores], some, low, high)
    if len(values) < 64:
        return low, high
    values, order = values.sort(descending=True)
    cumulative = masses[order].cumsum(0)
    middle = int(torch.searchsorted(cumulative, int(share * int(cumulative[-1]))))
    # Four standard deviations of the sample's rank; groups of unequal size only make a miss more likely.
    margin = 8 + int(4 * math.sqrt(len(values) * max(share * (1 - share), 0.0)))
    over = float(values[middle - margin]) if middle >= margin else high
    under = float(values[middle + margin]) if middle + margin < len(values) else low
    return under, over


def sample_stride(number: int, wanted: int) -> int:
    """The stride that samples about ``wanted`` of ``number`` entries, not in step with taps or channels."""
    stride = max(1, number // wanted)
    while math.gcd(stride, 210) > 1 and stride > 1:
        stride += 1
    return stride


def _boundary_inside(
    scores: Sequence[torch.Tensor],
    sizes: Sequence[int | torch.Tensor],
    room: int,
    low: float,
    high: float,
    from_high: int,
) -> _Boundary:
    """The boundary among the groups scored strictly between ``low`` and ``high``, by sorting them."""
    values, masses = _flat(scores, sizes, low, high)
    values, order = values.sort(descending=True)
    cumulative = masses[order].cumsum(0)
    value = values[int(torch.searchsorted(cumulative, room))]
    first, last = (values > value).count_nonzero(), (values >= value).count_nonzero()
    above = int(cumulative[first - 1]) if first else 0
    return _Boundary(float(value), from_high + above, int(cumulative[last - 1]) - above)


def _flat(
    scores: Sequence[torch.Tensor], sizes: Sequence[int | torch.Tensor], low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores strictly between ``low`` and ``high`` with their groups' sizes, on the CPU."""
    values, masses = [], []
    for score, size in zip(scores, sizes, strict=True):
        inside = (score > low) & (score < high)
        values.append(score[inside].cpu())
        inner = torch.tensor(size) if isinstance(size, int) else size[inside].cpu()
        masses.append(inner.expand(values[-1].shape))
    return torch.cat(values), torch.cat(masses)


def _mass(chosen: Iterable[torch.Tensor], sizes: Sequence[int | torch.Tensor]) -> int:
    """Number of weights in the chosen groups, with one synchronisation per device."""
    masses = [
        number_kept(mask) * size if isinstance(size, int) else size.where(mask, 0).sum()
        for mask, size in zip(chosen, sizes, strict=True)
    ]
    return sum(integers(masses))
