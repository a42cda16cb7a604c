"""Budget: how many weights to keep, as exact integers, overall and (where asked) in every layer.

A sparsity and an allocation over layers come in; a ``Budget`` goes out. There is one rounding rule in the
package, ``count``: ``floor(size * density + 0.5)``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real

from fxprune.sparsity.by_name import check_used, value_for

Allocation = str | Mapping[str, float]
"""``"global"``, ``"uniform"``, ``"erk"``, ``"owl"``, or sparsities by layer: ``{name or fnmatch pattern:
sparsity}``."""

KINDS = ("global", "uniform", "erk", "owl")


def count(size: int, density: float) -> int:
    """The rounding rule: ``floor(size * density + 0.5)``.

    >>> count(10, 1 - 0.9), count(270896, 865 / 270896)
    (1, 865)
    """
    return math.floor(size * density + 0.5)


@dataclass(frozen=True)
class Budget:
    """An exact number of weights to keep.

    ``total``: over all layers. ``sizes``: weights of every prunable parameter, pruned ones included.
    ``layers``: the exact number in every parameter, or ``None`` where scores compete globally. ``asked``: the
    density that was asked for, of which ``total`` is rounded, where it is known.
    """

    total: int
    sizes: dict[str, int]
    layers: dict[str, int] | None = None
    asked: float | None = None

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if self.layers.keys() != self.sizes.keys():
            raise ValueError("Budget: layers and sizes must name the same parameters")
        if sum(self.layers.values()) != self.total:
            raise ValueError(f"Budget: layers sum to {sum(self.layers.values())}, total is {self.total}")

    @property
    def density(self) -> float:
        """Fraction of all prunable weights that is kept."""
        return self.total / sum(self.sizes.values())

    def towards(self, fraction: Callable[[float], float], available: Mapping[str, int]) -> Budget:
        """The budget of a round on the way from ``available`` survivors to this budget.

        ``fraction(target)`` is the density, relative to the survivors at the start, that the schedule gives
        for a relative target; it is asked for the whole, or for each layer on its own. Never below target.
        """
        if self.layers is None:
            start = sum(available.values())
            asked, now = self.asked, start / sum(self.sizes.values())
            if asked is not None and asked < now:
                asked = max(asked, now * fraction(asked / now))
            return Budget(_between(self.total, start, fraction), self.sizes, asked=asked)
        layers = {name: _between(kept, available[name], fraction) for name, kept in self.layers.items()}
        return Budget(sum(layers.values()), self.sizes, layers)

    def capped(self, room: Mapping[str, int]) -> Budget:
        """The same budget where there is room for it, else as much as there is room for."""
        if self.layers is None:
            return replace(self, total=min(self.total, sum(room.values())))
        layers = {name: min(number, room[name]) for name, number in self.layers.items()}
        return replace(self, total=sum(layers.values()), layers=layers)


def _between(target: int, start: int, fraction: Callable[[float], float]) -> int:
    if target >= start:
        return target
    return min(start, max(target, count(start, fraction(target / start))))


def plan(
    allocation: Allocation,
    sparsity: float,
    shapes: Mapping[str, tuple[int, ...]],
    available: Mapping[str, int] | None = None,
) -> Budget:
    """The exact budget for removing ``sparsity`` of all weights, split over layers by ``allocation``.

    ``shapes``: shape of each prunable parameter, in the order of the layers. ``available``: how many weights
    each still has (all of them by default); no layer is given more, what it cannot take goes to the others.

    * ``"global"``: only the total is fixed, ``count(N, 1 - sparsity)``.
    * ``"uniform"``: every layer gets the same density; ``"erk"``: a density proportional to
      (sum of dims) / (product of dims) of its weight, capped at 1 (Evci et al. 2020, arXiv 1911.11134).
      Shares are rounded by largest remainder, so that the total is that of ``"global"``, to one weight. Where
      there is at least one weight per layer to give, no layer gets none.
    * ``"owl"``: as ``"global"``; the layers' shares follow from data, see
      :func:`fxprune.scoring.outliers.outlier_budget`.
    * a dict: each layer keeps ``count(n, 1 - s)`` weights, s being the entry of its name or else of the first
      pattern that fits the parameter's or its module's name; layers that no entry fits take ``sparsity``.

    Raises ``ValueError`` where the sparsity is out of range, nothing or more than there is would be kept, or
    a pattern fits no layer; ``TypeError`` for what is no number or allocation.

    >>> plan("erk", 0.5, {"a": (2, 2), "b": (1, 2)}).layers  # shares 12/7 and 9/7
    {'a': 2, 'b': 1}
    """
    _check_sparsity("sparsity", sparsity, closed=False)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = dict(sizes) if available is None else {name: available[name] for name in sizes}
    if not sizes:
        raise ValueError(
            "the model has no prunable weights: no convolution, linear or attention layer is left"
        )
    if isinstance(allocation, Mapping):
        return _plan_by_name(allocation, sparsity, sizes, left)
    if allocation not in KINDS:
        kinds = ", ".join(repr(kind) for kind in KINDS)
        raise (ValueError if isinstance(allocation, str) else TypeError)(
            f"budget={allocation!r}: expected {kinds} or a dict of layer name or pattern -> sparsity"
        )
    total = count(sum(sizes.values()), 1 - sparsity)
    _check_total(total, sum(sizes.values()), sum(left.values()), sparsity)
    if allocation in ("global", "owl"):
        return Budget(total, sizes, asked=1 - sparsity)
    ratios = dict.fromkeys(sizes, 1.0) if allocation == "uniform" else erk_ratios(shapes)
    layers = apportion(total, {name: ratios[name] * sizes[name] for name in sizes}, left)
    return Budget(total, sizes, layers, asked=1 - sparsity)


def erk_ratios(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Erdős-Rényi-kernel ratio of every layer: (sum of its weight's dims) / (product of them).

    >>> erk_ratios({"conv": (16, 3, 3, 3), "fc": (10, 64)})
    {'conv': 0.05787037037037037, 'fc': 0.115625}
    """
    return {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Real-valued ERK densities: eps * ratio, capped at 1, with the one eps that meets ``density`` overall.

    >>> {k: round(v, 4) for k, v in erk_densities({"a": (2, 2), "b": (1, 2)}, 0.8).items()}
    {'a': 0.7, 'b': 1.0}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = {name: ratio * sizes[name] for name, ratio in erk_ratios(shapes).items()}
    shares = fill(density * sum(sizes.values()), weights, dict.fromkeys(sizes, 0), sizes)
    return {name: share / sizes[name] for name, share in shares.items()}


def apportion(total: int, weights: Mapping[str, float], capacity: Mapping[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``weights``, exactly, none above its ``capacity``.

    Real shares first (``fill``), then largest remainder; equal remainders go to the earlier layer. With at
    least one unit per layer that has room, every such layer gets one.
    """
    room = sum(capacity.values())
    if not 0 <= total <= room:
        raise ValueError(f"cannot split {total} weights over layers that have room for {room}")
    open_layers = sum(1 for size in capacity.values() if size)
    floor = {name: min(1, size) if total >= open_layers else 0 for name, size in capacity.items()}
    shares = fill(total, weights, floor, capacity)
    # A share that float noise left just under an integer is that integer.
    counts = {name: min(capacity[name], math.floor(share + 1e-6)) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    missing = total - sum(counts.values())
    while missing > 0:
        for name in by_remainder:
            if missing and counts[name] < capacity[name]:
                counts[name] += 1
                missing -= 1
    return counts


def fill(
    total: float, weights: Mapping[str, float], floor: Mapping[str, int], capacity: Mapping[str, int]
) -> dict[str, float]:
    """Real shares ``clip(scale * weight, floor, capacity)``, at the one scale where they sum to ``total``.

    For ERK this is the fixed point of "make the layers above density 1 dense and share out again"; the scale
    only needs the sums between two neighbouring breakpoints, so nothing is divided by an empty set.
    """
    breakpoints = sorted({0.0, *(bound[n] / weights[n] for n in weights for bound in (floor, capacity))})

    def filled(scale: float) -> float:
        return math.fsum(_clip(scale * weights[name], floor[name], capacity[name]) for name in weights)

    above = min(bisect_left(breakpoints, total, key=filled), len(breakpoints) - 1)
    lower, scale = breakpoints[max(0, above - 1)], breakpoints[above]
    low, high = filled(lower), filled(scale)
    if high > low:  # the sum is linear in the scale between two breakpoints
        scale = lower + (scale - lower) * (min(total, high) - low) / (high - low)
    return {name: _clip(scale * weights[name], floor[name], capacity[name]) for name in weights}


def _clip(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def _plan_by_name(
    given: Mapping[str, float], sparsity: float, sizes: dict[str, int], left: Mapping[str, int]
) -> Budget:
    layers = {}
    for pattern, value in given.items():
        _check_sparsity(f"budget[{pattern!r}]", value, closed=True)
    for name, size in sizes.items():
        layers[name] = count(size, 1 - value_for(name, given, sparsity))
        if layers[name] > left[name]:
            raise ValueError(
                f"budget: {name!r} would keep {layers[name]} weights but has only {left[name]} left; "
                "pruning again only removes more, so ask for a higher sparsity there"
            )
    check_used("budget", given, sizes)
    total = sum(layers.values())
    _check_total(total, sum(sizes.values()), sum(left.values()), sparsity)
    return Budget(total, sizes, layers)


def _check_sparsity(argument: str, value: float, *, closed: bool) -> None:
    bounds = "[0, 1]" if closed else "[0, 1)"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{argument}={value!r}: expected a number in {bounds}, the fraction of weights to remove"
        )
    if not (0 <= value < 1 or (closed and value == 1)):
        hint = f"; {float(value) / 100:g}?" if 1 < value < 100 else ""
        raise ValueError(
            f"{argument}={value!r}: expected a number in {bounds}, the fraction of weights to remove{hint}"
        )


def _check_total(total: int, size: int, left: int, sparsity: float) -> None:
    if total < 1:
        raise ValueError(
            f"sparsity={sparsity!r} keeps none of the {size} prunable weights; ask for a lower one"
        )
    if total > left:
        raise ValueError(
            f"sparsity={sparsity!r} keeps {total} of {size} weights but only {left} are left; "
            f"pruning again only removes more, so ask for at least {1 - left / size:.6g}"
        )
