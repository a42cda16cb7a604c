"""Hold what was measured of several networks; show it as a table or as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fxprune.keywords import counted

__all__ = ["Bench", "Measured", "Timing", "sentence", "size"]


@dataclass(frozen=True)
class Measured:
    """One network: parameters, multiply-adds that it executes for one sample, and bytes.

    ``file_bytes``: of the file that :func:`fxprune.save` writes. ``peak_bytes``: by batch size, the most that
    weights and activations take at one time in eager mode.
    """

    parameters: int
    macs: int
    file_bytes: int
    peak_bytes: dict[int, int]


@dataclass(frozen=True)
class Timing:
    """The times of one network in one runtime at one batch size, in milliseconds, in their order."""

    network: str
    runtime: str
    batch: int
    milliseconds: list[float]

    @property
    def median(self) -> float:
        """The median, in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile, in milliseconds."""
        if len(self.milliseconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Bench:
    """Hold what :func:`fxprune.bench` measured; ``print`` shows it as a table.

    ``skipped``: by runtime, why it was not measured. The first network is the one that others are compared
    with.
    """

    networks: dict[str, Measured]
    timings: list[Timing]
    device: str
    threads: int
    skipped: dict[str, str] = field(default_factory=dict)

    def timing(self, network: str, runtime: str = "eager", batch: int = 1) -> Timing:
        """Return the times of one network; ``KeyError`` if it was not measured so."""
        for one in self.timings:
            if (one.network, one.runtime, one.batch) == (network, runtime, batch):
                return one
        raise KeyError((network, runtime, batch))

    def to_json(self) -> str:
        """Return all numbers as JSON, with medians and quartiles."""
        timings = [
            {
                "network": one.network,
                "runtime": one.runtime,
                "batch": one.batch,
                "median_ms": one.median,
                "quartiles_ms": list(one.spread),
                "runs": len(one.milliseconds),
            }
            for one in self.timings
        ]
        networks = {name: asdict(network) for name, network in self.networks.items()}
        facts = {"device": self.device, "threads": self.threads, "skipped": self.skipped}
        return json.dumps({**facts, "networks": networks, "timings": timings}, indent=2)

    def __str__(self) -> str:
        wide = max(map(len, self.networks), default=0) + 2
        lines = [f"{'network':<{wide}} {'parameters':>14} {'MACs':>16} {'file':>11}  peak memory"]
        for name, network in self.networks.items():
            peaks = ", ".join(f"{size(n)} (batch {batch})" for batch, n in network.peak_bytes.items())
            lines.append(
                f"{name:<{wide}} {network.parameters:>14,} {network.macs:>16,} {size(network.file_bytes):>11}"
                f"  {peaks}"
            )
        if self.timings:
            lines += [
                "",
                f"{'network':<{wide}} {'runtime':<12} {'batch':>5} {'median':>11}   {'quartiles':<19}",
            ]
        first = next(iter(self.networks), "")
        for one in self.timings:
            low, high = one.spread
            ratio = self.timing(first, one.runtime, one.batch).median / one.median
            beside = "" if one.network == first else f"  {ratio:.2f} x as fast as {first}"
            lines.append(
                f"{one.network:<{wide}} {one.runtime:<12} {one.batch:>5} {one.median:>8.2f} ms   "
                f"{f'{low:.2f} to {high:.2f} ms':<19}{beside}".rstrip()
            )
        if self.timings:
            runs = min(len(one.milliseconds) for one in self.timings)
            where = f"{self.device}, {counted(self.threads, 'thread')}"
            lines += ["", f"measured on {where}, medians of {runs} or more runs in turn"]
        lines += [f"{runtime}: {reason}" for runtime, reason in self.skipped.items()]
        return "\n".join(lines)


def sentence(timings: Sequence[Timing]) -> str:
    """Write times of one runtime and batch size in one line.

    >>> sentence([Timing("dense", "eager", 1, [4.0]), Timing("compact", "eager", 1, [2.0])])
    'time: 4.00 ms dense, 2.00 ms compact (eager, batch 1, medians of 1 run in turn)'
    """
    parts = ", ".join(f"{one.median:.2f} ms {one.network}" for one in timings)
    runs = min(len(one.milliseconds) for one in timings)
    where = f"{timings[0].runtime}, batch {timings[0].batch}"
    return f"time: {parts} ({where}, medians of {counted(runs, 'run')} in turn)"


def size(number: int) -> str:
    """Write a number of bytes in the unit that suits it.

    >>> size(102_500_000)
    '102.5 MB'
    """
    for unit, bound in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= bound:
            return f"{number / bound:.1f} {unit}"
    return f"{number} B"
