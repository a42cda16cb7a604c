"""Measure how long networks take, side by side."""

from fxprune.latency.bench import bench, measure
from fxprune.latency.results import Bench, Measured, Timing, sentence, size
from fxprune.latency.runtimes import RUNTIMES, check_runtime
from fxprune.latency.target import LatencyTarget

__all__ = [
    "RUNTIMES",
    "Bench",
    "LatencyTarget",
    "Measured",
    "Timing",
    "bench",
    "check_runtime",
    "measure",
    "sentence",
    "size",
]
