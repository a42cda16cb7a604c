"""Granularity: which weights are kept or dropped together.

Scores per weight come in; bundles of groups, with one score and one number of weights for each group, go out.
A group's score is the sum of its weights' scores, its size the number of its weights that are not pruned yet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.functional import pad

from fxprune.sparsity.masks import Masks, is_full, kept

NEVER = -math.inf
"""Score of a group that cannot be chosen: pruned before, or ruled out by its pattern."""


@dataclass(frozen=True)
class Bundle:
    """Groups that compete with one another, in the order that breaks ties.

    ``names``: the parameters whose weights they hold. ``scores``: one per group, 1-D, ``NEVER`` where a group
    cannot be chosen. ``sizes``: weights per group, one number where all groups hold equally many.
    ``spread(chosen)``: the masks, per parameter, of the chosen groups (bool, 1-D).
    """

    names: tuple[str, ...]
    scores: torch.Tensor
    sizes: int | torch.Tensor
    spread: Callable[[torch.Tensor], Masks]


@runtime_checkable
class Granularity(Protocol):
    """Describe what selection needs of a granularity."""

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """The groups of the weights that ``masks`` keep, with the scores of their weights summed."""

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The largest number of weights that may be kept in each parameter."""


@dataclass(frozen=True)
class Weight:
    """Each weight on its own: any count is met exactly."""

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """One group per weight."""
        return [_per_weight(name, _alive(score, masks[name])) for name, score in scores.items()]

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """All that is left."""
        return kept(masks)


@dataclass(frozen=True)
class Block:
    """Tiles of ``rows`` x ``columns`` kernels, in the matrix of the parameter's first two dimensions.

    All taps of a kernel belong to its tile; tiles at the lower and right edge may be smaller. ``None`` spans
    the whole dimension. ``Block(1, 1)`` is a kernel, ``Block(1, None)`` a channel (a slice of the first
    dimension). A count that whole groups cannot meet is approached from below: groups are taken by descending
    score, each that still fits.
    """

    rows: int
    columns: int | None

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.columns is not None and self.columns < 1):
            raise ValueError(f"block({self.rows},{self.columns}): expected two sizes of at least 1")

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """One group per tile."""
        return [self._bundle(name, score, masks[name]) for name, score in scores.items()]

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """All that is left."""
        return kept(masks)

    def _bundle(self, name: str, score: torch.Tensor, mask: torch.Tensor) -> Bundle:
        if self.rows == self.columns == 1 and mask.shape[2:].numel() == 1:
            return _per_weight(name, _alive(score, mask))
        sizes = self._pool(mask, torch.int64)
        # Summed in float64 and clamped: finite scores stay finite, and equal groups stay equal.
        limit = torch.finfo(score.dtype).max
        pooled = self._pool(score.where(mask, 0), torch.float64).clamp(-limit, limit).to(score.dtype)
        pooled = pooled.where(sizes > 0, NEVER)

        def spread(chosen: torch.Tensor) -> Masks:
            return {name: self._tiles_to_weights(chosen.view_as(pooled), mask)}

        return Bundle((name,), pooled.flatten(), sizes.flatten(), spread)

    def _pool(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        matrix = values.flatten(2).sum(-1, dtype=dtype) if values.dim() > 2 else values.to(dtype)
        height, width = matrix.shape
        rows, columns = self.rows, self.columns or width
        if rows == columns == 1:
            return matrix
        padded = pad(matrix, (0, -width % columns, 0, -height % rows))
        return padded.reshape(-(-height // rows), rows, -(-width // columns), columns).sum(dim=(1, 3))

    def _tiles_to_weights(self, chosen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        height, width = mask.shape[:2]
        for dim, size in enumerate((self.rows, self.columns or width)):
            if size > 1:
                chosen = chosen.repeat_interleave(size, dim)
        chosen = chosen[:height, :width]
        return chosen.view(*chosen.shape, *[1] * (mask.dim() - 2)) & mask


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` consecutive weights along the input dimension (dim 1), per output and tap.

    A shorter group at the end of a row keeps at most ``n`` too. Within the pattern weights compete one by
    one, so that any count the pattern has room for is met exactly; more than that is an error.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"nm({self.n},{self.m}): expected 1 <= n <= m, as in nm(2,4)")

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """One group per weight; all but the best ``n`` of every ``m`` are ruled out."""
        bundles = []
        for name, score in scores.items():
            alive = _alive(score, masks[name])
            best = self._rank(alive) < self.n
            bundles.append(_per_weight(name, alive.where(best, NEVER)))
        return bundles

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Count what the pattern leaves of the weights that are left."""
        sums = [self._columns(mask, False).sum(2).clamp(max=self.n).sum().cpu() for mask in masks.values()]
        return dict(zip(masks, torch.stack(sums).tolist(), strict=True)) if sums else {}

    def _columns(self, values: torch.Tensor, filler: float | bool) -> torch.Tensor:
        """(out, groups, m, *taps), the last group filled up."""
        missing = -values.shape[1] % self.m
        padded = pad(values, (*[0, 0] * (values.dim() - 2), 0, missing), value=filler) if missing else values
        groups = padded.shape[1] // self.m
        return padded.reshape(values.shape[0], groups, self.m, *values.shape[2:])

    def _rank(self, values: torch.Tensor) -> torch.Tensor:
        """Count the weights of its group that go before each: larger ones, and equal ones before it.

        m(m-1)/2 comparisons of slices, which for small m is many times faster than sorting rows of m.
        """
        columns = self._columns(values, NEVER)
        rank = torch.zeros_like(columns, dtype=torch.int16)
        for earlier in range(self.m):
            for later in range(earlier + 1, self.m):
                before = columns[:, :, earlier] >= columns[:, :, later]
                rank[:, :, later] += before
                rank[:, :, earlier] += ~before
        return rank.flatten(1, 2)[:, : values.shape[1]]


@dataclass(frozen=True)
class Channel:
    """Whole channels, with all that goes with them in the network's graph.

    ``pool`` makes one score of the scores of a group's weights: "mean", "sum", "l2" or "max". ``sides``: of
    the weights in its rows and columns ("both") or in its rows alone. ``normalize``: "none"; "family" to
    divide a group's score by the mean over its family of tied layers; "method", as the method has it:
    "family" for magnitude, taylor and obd among groups of one kind (``scope="isomorphic"``).
    ``whole_heads``: attention loses whole heads, instead of equally many channels in every head. Where no
    graph is known a channel is a slice of the first dimension.

    ``of``: what the sparsity is a share of: "weights" (the prunable ones), "params" (all parameters of the
    network), "macs" (multiply-adds), "memory" (the most bytes of activations at one time) or "latency" (the
    time of ``runtime`` on so many ``threads``, as measured here). With ``pool="mean"`` groups then compete by
    the sum of their scores per cost. ``scope``: "global"; "layer", every family of tied layers loses the same
    share of its groups; "uniform", likewise, and equal layers stay equally wide; "isomorphic", every kind of
    group does (Fang et al. 2024, arXiv 2407.04616).
    ``round_to``: layers keep a multiple of so many channels, where they can; ``min_channels``: so many every
    layer keeps at least; ``max_sparsity``: the share of them that it loses at most. The last two are one
    number for all layers, or numbers by layer: ``{name or fnmatch pattern: number}``, of outputs alone.
    ``at_most``: instead of a sparsity, the cost that may stay, in the unit of ``of``: weights, parameters,
    multiply-adds of a sample, bytes, or milliseconds as measured.
    """

    pool: str = "mean"
    whole_heads: bool = False
    of: str = "weights"
    scope: str = "global"
    round_to: int = 1
    min_channels: int | Mapping[str, int] = 1
    max_sparsity: float | Mapping[str, float] = 1.0
    sides: str = "both"
    normalize: str = "method"
    runtime: str = "eager"
    threads: int | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        for option, accepted in CHOICES.items():
            value = getattr(self, option)
            if value not in accepted:
                raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, accepted))}")
        for option in ("round_to", "min_channels"):
            for value in _numbers(getattr(self, option), one=option == "round_to"):
                if type(value) is not int or value < 1:
                    raise ValueError(f"{option}={value!r}: expected a number of channels, at least 1")
        for option, usual in (("runtime", "eager"), ("threads", None)):
            value = getattr(self, option)
            if value != usual and self.of != "latency":
                raise ValueError(f"{option}={value!r}: of={self.of!r} is not measured; take of='latency'")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"threads={self.threads!r}: expected a number of threads, at least 1")
        limit = self.at_most
        if limit is not None and (type(limit) not in (int, float) or not limit > 0):
            raise ValueError(f"at_most={limit!r}: expected a number of {UNITS[self.of]}, above 0")
        for value in _numbers(self.max_sparsity):
            by_layer = isinstance(self.max_sparsity, Mapping)
            if type(value) not in (int, float) or not 0 <= value <= 1 or not (value or by_layer):
                expected = "[0, 1]" if by_layer else "(0, 1]"
                raise ValueError(f"max_sparsity={value!r}: expected a share of channels in {expected}")

    def __str__(self) -> str:
        return "head" if self.whole_heads else "channel"

    def bundles(self, scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[Bundle]:
        """One group per slice of the first dimension."""
        return Block(1, None).bundles(scores, masks)

    def room(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """All that is left."""
        return kept(masks)


def _numbers(given: Any, *, one: bool = False) -> list[Any]:
    """All numbers that are given for an option: one, or one for each layer."""
    return list(given.values()) if isinstance(given, Mapping) and not one else [given]


POOLS = ("mean", "sum", "l2", "max")
"""How the scores of a group's weights become one."""

CHANNEL_OPTIONS = (
    "pool", "of", "scope", "round_to", "min_channels", "max_sparsity", "sides", "normalize",
    "runtime", "threads", "at_most",
)  # fmt: skip
"""Options of a `Channel` that :func:`fxprune.apply` takes by name."""

COSTS = ("weights", "params", "macs", "memory", "latency")
"""What the sparsity of channels is a share of."""

UNITS = {"weights": "weights", "params": "parameters", "macs": "MACs", "memory": "bytes", "latency": "ms"}
"""The unit of each of ``COSTS``."""


def in_unit(cost: float, of: str) -> str:
    """Write a cost in its unit.

    >>> in_unit(1290560.0, "macs"), in_unit(0.48223, "latency")
    ('1290560 MACs', '0.4822 ms')
    """
    return f"{cost:.0f} {UNITS[of]}" if cost >= 100 else f"{cost:.4g} {UNITS[of]}"


SCOPES = ("global", "layer", "uniform", "isomorphic")
"""Which channel groups compete with one another."""

CHOICES = {
    "pool": POOLS,
    "of": COSTS,
    "scope": SCOPES,
    "sides": ("both", "rows"),
    "normalize": ("method", "none", "family"),
    "runtime": ("eager", "compile", "onnxruntime"),
}
"""What the options of a `Channel` that are words may be."""

WEIGHT = Weight()
KERNEL = Block(1, 1)
CHANNEL = Channel()

_PATTERN = re.compile(r"(nm|block)\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_RATIO = re.compile(r"(\d+)\s*:\s*(\d+)")


def resolve(granularity: str | Granularity, **options: Any) -> Granularity:
    """The granularity that a name means; an object of one's own is returned as it is.

    Names: ``"weight"``, ``"kernel"`` (the taps between one input and one output channel), ``"channel"`` (a
    channel and all that goes with it), ``"head"`` (the same, but attention loses whole heads),
    ``"2:4"`` or ``"nm(2,4)"``, ``"block(16,16)"``. ``options``: those of a :class:`Channel`
    (``CHANNEL_OPTIONS``), for channels and heads only, ``None`` for what is not given. Errors:
    ``ValueError``, ``TypeError``.

    >>> resolve("2:4")
    NM(n=2, m=4)
    >>> resolve("channel", pool="l2").pool
    'l2'
    """
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        found = resolve(granularity)
        if not isinstance(found, Channel):
            name, value = next(iter(options.items()))
            raise ValueError(
                f"{name}={value!r}: granularity {granularity!r} has none; 'channel' and 'head' do"
            )
        return replace(found, **options)
    named: dict[str, Granularity] = {
        "weight": WEIGHT,
        "kernel": KERNEL,
        "channel": CHANNEL,
        "head": Channel(whole_heads=True),
    }
    if isinstance(granularity, Granularity) and not isinstance(granularity, type):
        return granularity
    if not isinstance(granularity, str):
        raise TypeError(
            f"granularity={granularity!r}: expected a name such as 'weight', or a granularity object"
        )
    text = granularity.strip().lower()
    if text in named:
        return named[text]
    ratio = _RATIO.fullmatch(text)
    if ratio is not None:
        return NM(int(ratio.group(1)), int(ratio.group(2)))
    match = _PATTERN.fullmatch(text)
    if match is None:
        names = ", ".join(repr(name) for name in (*named, "2:4", "nm(2,4)", "block(16,16)"))
        raise ValueError(f"granularity={granularity!r}: expected one of {names}")
    kind, first, second = match.group(1), int(match.group(2)), int(match.group(3))
    return NM(first, second) if kind == "nm" else Block(first, second)


def _alive(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The scores, ``NEVER`` where pruned; no copy where nothing is."""
    return scores if is_full(mask) else scores.where(mask, NEVER)


def _per_weight(name: str, scores: torch.Tensor) -> Bundle:
    return Bundle((name,), scores.flatten(), 1, lambda chosen: {name: chosen.view(scores.shape)})
