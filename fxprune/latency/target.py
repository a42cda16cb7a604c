"""Meet a latency as it is measured: prune, compact, measure, and correct what is asked for."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fxprune.capture.inputs import example_inputs_for
from fxprune.keywords import counted
from fxprune.latency.bench import evaluating, run_in_turn
from fxprune.latency.runtimes import prepare
from fxprune.rewrite.files.export import drawn_arguments

__all__ = ["LatencyTarget", "meet_latency", "stopwatch"]

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
        where = f"{self.runtime}, {counted(self.threads, 'thread')}, batch {self.batch}, {self.device}"
        return (
            f"latency: {self.dense:.3g} ms dense, target {self.target:.3g} ms, predicted {self.predicted:.3g}"
            f" ms, measured {self.measured:.3g} ms ({where})"
        )


def meet_latency(
    prune: Callable[[float], tuple[_Masks, float, float]],
    timed: Callable[[_Masks], tuple[float, float]],
    wanted: Callable[[float], float],
    share: float,
) -> tuple[_Masks, tuple[float, float, float], int]:
    """Find masks under which the compact network takes the time that is wanted, as measured.

    Args:
        prune: makes masks for a share of the predicted time; also the time that is predicted of them, and the
            share that they were made for, which may be larger, as the smallest that there is.
        timed: measures the whole and the compact network, in milliseconds.
        wanted: the time that is wanted, for that of the whole network.
        share: of the predicted time, to begin with.

    Returns:
        The masks that came nearest; the times of the whole network, as predicted, and as measured; and the
        number of rounds.

    Warns (``UserWarning``) where no masks were within 3 %.
    """
    asked, best, rounds = min(share, 1.0), None, 0
    low, high = (0.0, -1.0), (2.0, 1.0)  # shares too fast and too slow, and by which part of the target
    while rounds < ROUNDS:
        rounds += 1
        masks, predicted, done = prune(min(asked, 1.0))
        dense, measured = timed(masks)
        wrong = measured / wanted(dense) - 1
        fast = done >= 1 and wrong < 0  # all of it may be faster than that
        if best is None or abs(wrong) < abs(best[0]):
            best = wrong, masks, (dense, predicted, measured)
        if abs(wrong) <= TOLERANCE or fast:
            break
        low, high = (max(low, (done, wrong)), high) if wrong < 0 else (low, min(high, (done, wrong)))
        asked = done / (1 + wrong)
        if not low[0] < asked < high[0]:
            way = -low[1] / (high[1] - low[1])
            asked = low[0] + (high[0] - low[0]) * min(max(way, 0.1), 0.9)
    assert best is not None
    wrong, masks, times = best
    target = wanted(times[0])
    if abs(wrong) > TOLERANCE and not fast:
        warnings.warn(
            f"of='latency': measured {times[2]:.3g} ms, {wrong:+.1%} from the target of {target:.3g} ms, "
            f"after {rounds} rounds: channels are coarse, or other work disturbs the measurement",
            stacklevel=6,  # the line that called apply
        )
    return masks, times, rounds


@contextmanager
def stopwatch(
    dense: nn.Module, runtime: str, threads: int, batch: int
) -> Iterator[Callable[[nn.Module], tuple[float, float]]]:
    """Give a function that measures a network in turn with ``dense``: milliseconds of both.

    The second is the first times the median ratio of neighbouring runs: other work on the machine
    slows both of a pair alike.
    """
    given = example_inputs_for(dense, None)
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    call = drawn_arguments(given, dense, batch)
    with tempfile.TemporaryDirectory() as folder:
        with evaluating([dense], threads):
            whole = prepare(runtime, dense, None, call, threads, Path(folder))

        def timed(small: nn.Module) -> tuple[float, float]:
            with evaluating([dense, small], threads):
                run = prepare(runtime, small, None, call, threads, Path(folder))
                times = run_in_turn({"dense": whole, "small": run}, SECONDS, device)
            pairs = zip(times["dense"], times["small"], strict=True)
            ratio = statistics.median(after / before for before, after in pairs)
            before = statistics.median(times["dense"])
            return before, before * ratio

        yield timed
