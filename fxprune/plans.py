"""Hold a plan: the channels that would go, what that saves in every layer, and other targets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.methods import Method, Problem
from fxprune.sparsity.granularity import UNITS, Channel
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks
from fxprune.whole_files import check_file_name, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plan", "PlannedLayer", "TargetPoint", "channels_in_words"]

VERSION = 1

Pair = tuple[float, float]


@dataclass(frozen=True)
class PlannedLayer:
    """One parameter, before and after: channels, weights, multiply-adds of a sample, and milliseconds.

    ``share``: of the network's multiply-adds, before. ``milliseconds``: predicted, ``None`` where no times
    were measured. ``removed``: the output channels that go, as ranges.
    """

    name: str
    outputs: Pair
    inputs: Pair
    weights: Pair
    macs: Pair
    share: float
    milliseconds: Pair | None = None
    removed: str = ""


@dataclass(frozen=True)
class TargetPoint:
    """One target: the sparsity asked for, the cost that is left, and the share of all scores that is kept."""

    sparsity: float
    cost: float
    kept_score: float


@dataclass(frozen=True)
class Plan:
    """Hold what :func:`fxprune.apply` would remove; ``print`` shows a table, ``plot`` the trade-off.

    ``cost``: before and after, in the unit of ``of``; ``parameters`` and ``macs`` of the whole network.
    ``curve``: targets from one scoring, the first of a method that scores in rounds; empty for methods
    without scores. ``excluded``: the layers that may not lose outputs. ``options``: of the granularity.
    """

    method: str
    sparsity: float
    of: str
    cost: Pair
    parameters: Pair
    macs: Pair
    layers: tuple[PlannedLayer, ...]
    curve: tuple[TargetPoint, ...] = ()
    excluded: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> str:
        """Return the plan as JSON, for people and for :meth:`load`."""
        return json.dumps({"fxprune_plan": VERSION, **asdict(self)}, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote; ``ValueError`` where the file holds none."""
        check_file_name(path, example="plan.json")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{os.fspath(path)!r}: no such plan; make one with fxprune.plan")
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: no plan, it is not JSON ({error})") from error
        if not isinstance(found, dict) or found.pop("fxprune_plan", None) != VERSION:
            raise ValueError(f"{os.fspath(path)!r}: no plan of version {VERSION}; make one with fxprune.plan")
        try:
            for name in ("cost", "parameters", "macs", "excluded"):
                found[name] = tuple(found[name])
            found["layers"] = tuple(PlannedLayer(**_pairs(layer)) for layer in found["layers"])
            found["curve"] = tuple(TargetPoint(**point) for point in found["curve"])
            return cls(**found)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r}: a damaged plan ({error}); make one with fxprune.plan"
            ) from error

    def granularity(self) -> Channel:
        """Return the granularity that masks of this plan are made with."""
        return Channel(whole_heads=bool(self.options.get("whole_heads", False)))

    def as_method(self) -> Method:
        """Return the method that removes the channels of this plan, whatever the scores."""
        return Method(self.method, self.find, needs=frozenset({"graph"}), scored=False)

    def find(self, problem: Problem) -> Masks:
        """Return the masks of this plan; ``ValueError`` where the network is not the one it was made of."""
        grain = problem.granularity
        assert isinstance(grain, ChannelGroups)
        groups = grain.groups
        widths = {name: len(numbers) for name, numbers in groups.rows.items()}
        planned = {layer.name: int(layer.outputs[0]) for layer in self.layers}
        odd = next((name for name in {**widths, **planned} if widths.get(name) != planned.get(name)), None)
        if odd is not None:
            raise ValueError(
                f"plan: it was made of another network: {odd!r} has {planned.get(odd, 'no')} outputs in the "
                f"plan, {widths.get(odd, 'none')} in the model"
            )
        staying = torch.ones(groups.count, dtype=torch.bool)
        for layer in self.layers:
            channels = _channels_of(layer)
            if any(not 0 <= channel < widths[layer.name] for channel in channels):
                raise ValueError(
                    f"plan: removed={layer.removed!r} of {layer.name!r}, whose channels are numbered from 0"
                    f" to {widths[layer.name] - 1}"
                )
            gone = groups.rows[layer.name][channels]
            if bool((gone < 0).any()):
                raise ValueError(f"plan: {layer.name!r} would lose channels that cannot go; make it anew")
            staying[gone] = False
        return {
            name: groups.kept(name, staying).to(mask.device) & mask for name, mask in problem.masks.items()
        }

    def plot(self) -> Figure:
        """Draw the share of the scores that is kept over the share of the cost that is left.

        Needs matplotlib; raises ``ImportError`` without, ``ValueError`` where the plan has no curve.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plan.plot needs matplotlib: pip install 'fxprune[plot]'") from error
        if not self.curve:
            raise ValueError(f"plan: method {self.method!r} gives no scores, so there is no curve to draw")
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        costs = [100 * point.cost / self.cost[0] for point in self.curve]
        axes.plot(costs, [100 * point.kept_score for point in self.curve], marker="o")
        axes.axvline(100 * self.cost[1] / self.cost[0], linestyle="--", color="gray")
        axes.set_xlabel(f"{UNITS[self.of]} left (%)")
        axes.set_ylabel("scores kept (%)")
        axes.set_title(f"{self.method}, {100 * self.sparsity:g} % of {UNITS[self.of]} planned to go")
        axes.grid(visible=True, alpha=0.3)
        return figure

    def __str__(self) -> str:
        timed = any(layer.milliseconds for layer in self.layers)
        wide = max([len(layer.name) for layer in self.layers] + [5])
        lines = [
            f"{'layer':<{wide}} {'outputs':>13} {'inputs':>13} {'weights':>21} {'MACs':>25} {'share':>6}"
            + (f" {'ms':>16}" if timed else "")
        ]
        for layer in self.layers:
            line = (
                f"{layer.name:<{wide}} {_arrow(layer.outputs):>13} {_arrow(layer.inputs):>13} "
                f"{_arrow(layer.weights):>21} {_arrow(layer.macs):>25} {layer.share:>6.1%}"
            )
            if timed and layer.milliseconds is not None:
                before, after = layer.milliseconds
                line += f" {f'{before:.3f} -> {after:.3f}':>16}"
            lines.append(line)
        lines.append(f"whole network: parameters {_arrow(self.parameters)}, MACs {_arrow(self.macs)}")
        whole, left = (f"{cost:,.0f}" if self.of != "latency" else f"{cost:.3g}" for cost in self.cost)
        lines.append(
            f"{self.method} to {self.sparsity:g} of {self.of}: {whole} -> {left} {UNITS[self.of]} "
            f"({self.cost[1] / self.cost[0]:.1%} left)"
        )
        lines += [
            f"  at {point.sparsity:.2f}: {point.cost / self.cost[0]:6.1%} left, {point.kept_score:6.1%} of "
            "the scores kept"
            for point in self.curve
        ]
        lines.append("nothing is changed yet: fxprune.apply(model, plan) removes it")
        return "\n".join(lines)


def channels_in_words(numbers: list[int]) -> str:
    """Write ascending numbers as ranges.

    >>> channels_in_words([0, 1, 2, 7])
    '0-2 7'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return " ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in ranges)


def channels_of_words(text: str) -> list[int]:
    """Read numbers that :func:`channels_in_words` wrote.

    >>> channels_of_words("0-2 7")
    [0, 1, 2, 7]
    """
    found: list[int] = []
    for word in text.split():
        low, _, high = word.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def _channels_of(layer: PlannedLayer) -> list[int]:
    try:
        return channels_of_words(layer.removed)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"plan: removed={layer.removed!r} of {layer.name!r}: expected numbers and ranges, as in '0-2 7'"
        ) from error


def _pairs(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer, lists as the pairs that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}


def _arrow(pair: Pair) -> str:
    return f"{pair[0]:,.0f} -> {pair[1]:,.0f}" if pair[0] != pair[1] else f"{pair[0]:,.0f}"
