"""Meet a latency as it is measured: prune, compact, measure, and correct what is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fxprune.latency.bench import measure
from fxprune.latency.results import Timing

__all__ = ["LatencyTarget", "meet_latency", "time_pair"]

TOLERANCE = 0.03
"""How far from the target a measured time may be."""

ROUNDS = 6
SECONDS = 0.5
_Masks = TypeVar("_Masks")


@dataclass(frozen=True)
class LatencyTarget:
    """Hold times in milliseconds: the target, and what was predicted and measured of the compact network.

    ``dense``: measured of the whole network, in turn with the compact one. ``target``: the part of it that
    was asked for. ``rounds``: how often a network was pruned and measured.
    """

    dense: float
    target: float
    predicted: float
    measured: float
    runtime: str
    threads: int
    batch: int
    device: str
    rounds: int

    def __str__(self) -> str:
        return (
            f"latency: {self.dense:.3g} ms dense, target {self.target:.3g} ms, predicted "
            f"{self.predicted:.3g} ms, measured {self.measured:.3g} ms ({self.runtime}, {self.threads} threads, batch {self.batch}, "
            f"{self.device})"
        )


def meet_latency(
    prune: Callable[[float], tuple[_Masks, float]],
    timed: Callable[[_Masks], tuple[float, float]],
    share: float,
) -> tuple[_Masks, tuple[float, float, float], int]:
    """Find masks under which the compact network takes ``share`` of the whole one's time, as measured.

    Args:
        prune: makes masks, and the time predicted of them, for a share of the predicted time.
        timed: measures the whole and the compact network, in milliseconds.
        share: of the whole network's time, in (0, 1].

    Returns:
        The masks that came nearest; the times of the whole network, as predicted, and as measured; and the
        number of rounds.

    Warns (``UserWarning``) where no masks were within 3 %.
    """
    asked, best, rounds = share, None, 0
    low, high = 0.0, 2.0  # shares known to give a network that is too fast, too slow
    while rounds < ROUNDS:
        rounds += 1
        masks, predicted = prune(min(asked, 1.0))
        dense, measured = timed(masks)
        wrong = measured / (share * dense) - 1
        if best is None or abs(wrong) < abs(best[0]):
            best = wrong, masks, (dense, predicted, measured)
        if abs(wrong) <= TOLERANCE or (asked >= 1 and wrong < 0):
            break
        low, high = (max(low, asked), high) if wrong < 0 else (low, min(high, asked))
        asked /= 1 + wrong
        if not low < asked < high:
            asked = (low + high) / 2
    assert best is not None
    wrong, masks, times = best
    if abs(wrong) > TOLERANCE:
        warnings.warn(
            f"of='latency': measured {times[2]:.3g} ms, {wrong:+.1%} from the target of "
            f"{share * times[0]:.3g} ms, after {rounds} rounds: channels are coarse, or other work disturbs the measurement",
            stacklevel=5,  # the line that called apply
        )
    return masks, times, rounds


def time_pair(
    dense: nn.Module, small: nn.Module, runtime: str, threads: int | None, batch: int
) -> list[Timing]:
    """Measure the whole and the compact network, in turn."""
    networks = {"dense": dense, "compact": small}
    return measure(networks, batch=(batch,), runtimes=(runtime,), threads=threads, seconds=SECONDS)
