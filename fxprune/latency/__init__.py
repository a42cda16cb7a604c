"""Measure how long networks take, side by side."""

from fxprune.latency.bench import bench
from fxprune.latency.results import Bench, Network, Timing
from fxprune.latency.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Bench", "Network", "Timing", "bench"]
