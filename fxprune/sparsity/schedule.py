"""Schedules: how the density falls over the rounds of an iterative method.

A round and a target density come in, the density after that round goes out. Every schedule starts at density
1 and ends at the target; the exact count of the last round is the budget's, whatever a schedule computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

DensityFunction = Callable[[int, int, float], float]
"""``f(t, rounds, target) -> density`` after round t of 1..rounds."""


@runtime_checkable
class Schedule(Protocol):
    """Describe what a method needs of a schedule: the number of rounds, and the density after each."""

    @property
    def rounds(self) -> int:
        """Number of rounds T, at least 1."""

    def density(self, t: int, target: float) -> float:
        """Density after round ``t`` (1..T) on the way from 1 to ``target``."""


@dataclass(frozen=True)
class OneShot:
    """One round that prunes everything there is to prune."""

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds != 1:
            raise ValueError(f"OneShot: rounds={self.rounds!r}, a one-shot schedule has one round")

    def density(self, t: int, target: float) -> float:
        """The target."""
        return target


@dataclass(frozen=True)
class Linear:
    """``1 - (t/T)(1 - d)``: the same number of weights in every round.

    >>> [round(Linear(4).density(t, 0.01), 4) for t in range(1, 5)]
    [0.7525, 0.505, 0.2575, 0.01]
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        _check_rounds(self)

    def density(self, t: int, target: float) -> float:
        """Density after round ``t``."""
        return 1 - t / self.rounds * (1 - target)


@dataclass(frozen=True)
class Exponential:
    """``d^(t/T)``: the same fraction of the survivors in every round (Tanaka et al. 2020, arXiv 2006.05467).

    >>> [round(Exponential(4).density(t, 0.01), 5) for t in range(1, 5)]
    [0.31623, 0.1, 0.03162, 0.01]
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        _check_rounds(self)

    def density(self, t: int, target: float) -> float:
        """Density after round ``t``."""
        return float(target ** (t / self.rounds))


@dataclass(frozen=True)
class Cubic:
    """``d + (1 - d)(1 - t/T)^3``: much at first, little at last (Zhu & Gupta 2017, arXiv 1710.01878).

    >>> round(1 - Cubic(2).density(1, 0.1), 6)  # half-way to 90 % sparsity
    0.7875
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        _check_rounds(self)

    def density(self, t: int, target: float) -> float:
        """Density after round ``t``."""
        return target + (1 - target) * (1 - t / self.rounds) ** 3


@dataclass(frozen=True)
class Sigmoid:
    """Little at both ends, most at ``centre``, as ASNI prunes; stretched to meet 1 and the target exactly.

    ``centre``: the fraction of the rounds at which pruning is fastest; ``steepness``: the logistic's slope
    per whole run (ASNI's E/gamma, 10 in most of its settings).

    >>> [round(Sigmoid(4).density(t, 0.2), 3) for t in range(1, 5)]
    [0.944, 0.6, 0.256, 0.2]
    """

    rounds: int = 100
    centre: float = 0.5
    steepness: float = 10.0

    def __post_init__(self) -> None:
        _check_rounds(self)
        if not (self.steepness > 0 and self._logistic(1.0) > self._logistic(0.0)):
            raise ValueError(
                f"Sigmoid: steepness={self.steepness!r} at centre={self.centre!r} is flat, try 10 at 0.5"
            )

    def density(self, t: int, target: float) -> float:
        """Density after round ``t``."""
        start, now, end = (self._logistic(at) for at in (0.0, t / self.rounds, 1.0))
        return 1 - (1 - target) * (now - start) / (end - start)

    def _logistic(self, progress: float) -> float:
        return math.tanh(self.steepness * (progress - self.centre) / 2)  # an affine image of the logistic


@dataclass(frozen=True)
class Custom:
    """A function of one's own, ``function(t, rounds, target) -> density`` after round t of 1..rounds.

    >>> Custom(lambda t, rounds, target: 1.0 if t < rounds else target, rounds=3).density(2, 0.1)
    1.0
    """

    function: DensityFunction
    rounds: int = 100

    def __post_init__(self) -> None:
        _check_rounds(self)

    def density(self, t: int, target: float) -> float:
        """Density after round ``t``; ``ValueError`` unless the function gives a number in [0, 1]."""
        value = float(self.function(t, self.rounds, target))
        if not 0 <= value <= 1:
            raise ValueError(f"schedule: density {value!r} after round {t} of {self.rounds}, expected 0 to 1")
        return value


_BY_NAME: dict[str, Callable[[int], Schedule]] = {
    "exponential": Exponential,
    "linear": Linear,
    "cubic": Cubic,
    "sigmoid": Sigmoid,
}


def resolve(schedule: str | Schedule | DensityFunction | None, default: Schedule) -> Schedule:
    """The schedule that ``schedule`` means, for a method whose own is ``default``.

    ``None`` is the default itself; a name (``"oneshot"``, ``"linear"``, ``"exponential"``, ``"cubic"``,
    ``"sigmoid"``, also with its rounds: ``"cubic(20)"``) and a plain function take the default's number of
    rounds, or 100 where the default is a single round. Errors: ``ValueError`` for an unknown name,
    ``TypeError`` for anything else.

    >>> resolve("linear", Exponential(10))
    Linear(rounds=10)
    """
    rounds = default.rounds if default.rounds > 1 else 100
    if schedule is None:
        return default
    if isinstance(schedule, Schedule) and not isinstance(schedule, type):
        return schedule
    if isinstance(schedule, str):
        return _named(schedule, rounds)
    if callable(schedule) and not isinstance(schedule, type):
        return Custom(schedule, rounds)
    raise TypeError(
        f"schedule={schedule!r}: expected a name, a schedule such as Exponential(100), or a function"
    )


def _named(text: str, rounds: int) -> Schedule:
    name, _, argument = text.strip().lower().partition("(")
    argument = argument.rstrip(")").strip()
    if name == "oneshot" and not argument:
        return OneShot()
    if name not in _BY_NAME or not (argument.isdecimal() or not argument):
        names = ", ".join(repr(known) for known in ("oneshot", *_BY_NAME))
        raise ValueError(f"schedule={text!r}: expected one of {names}, with rounds as in 'exponential(100)'")
    return _BY_NAME[name](int(argument) if argument else rounds)


def _check_rounds(schedule: Schedule) -> None:
    rounds = schedule.rounds
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"{type(schedule).__name__}: rounds={rounds!r}, expected an integer of at least 1")
    if rounds < 1:
        raise ValueError(f"{type(schedule).__name__}: rounds={rounds!r}, expected an integer of at least 1")
