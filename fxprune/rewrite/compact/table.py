"""The table of a compaction: what every layer had, and what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from fxprune.channels.counts import dense_macs
from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.kept import Slices, flat_places

__all__ = ["CompactedLayer", "Compaction", "tabulate"]


@dataclass(frozen=True)
class CompactedLayer:
    """One parameter: channels, weights and multiply-adds before and after; why dead channels stayed.

    All are 0 after, where the parameter was in a branch that gave a constant and is gone.
    ``given_back``: output channels that no path uses, nor anything that goes with them, and that stayed;
    ``reason`` says why. ``tied``: output channels that no path uses, but channels that go with them are.
    """

    name: str
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    weights: tuple[int, int]
    macs: tuple[int, int]
    given_back: int
    reason: str
    tied: int = 0


@dataclass(frozen=True)
class Compaction:
    """Hold what :func:`fxprune.compact` did; ``print`` shows it as a table.

    ``parameters``: before and after, of the whole network; ``products``: the multiply-adds of products of two
    values, such as attention, which are in no layer. ``difference``: the largest difference of outputs,
    over the largest output; ``None`` if it was not verified. ``kept``: by parameter or buffer that got
    smaller, what stayed of it.
    """

    layers: tuple[CompactedLayer, ...]
    parameters: tuple[int, int]
    difference: float | None = None
    products: tuple[int, int] = (0, 0)
    kept: Slices = field(default_factory=dict, repr=False, compare=False)

    @property
    def index_map(self) -> dict[str, torch.Tensor]:
        """By parameter or buffer that got smaller, the flat places in the old tensor of what is left.

        They are in the new shape (int64), and made anew with every call.
        """
        return flat_places(self.kept)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of the network for one sample, before and after."""
        counts = [layer.macs for layer in self.layers] + [self.products]
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    @property
    def given_back(self) -> int:
        """Output channels that no path uses and that stayed all the same."""
        return sum(layer.given_back for layer in self.layers)

    def __str__(self) -> str:
        head = f"{'layer':<44} {'outputs':>13} {'inputs':>13} {'weights':>21} {'MACs':>23}  given back"
        lines = [head]
        for layer in self.layers:
            back = f"{layer.given_back}: {layer.reason}" if layer.given_back else ""
            if layer.tied:
                back += f"{'; ' if back else ''}{layer.tied} go with channels that are alive"
            lines.append(
                f"{layer.name:<44} {_pair(layer.outputs):>13} {_pair(layer.inputs):>13} "
                f"{_pair(layer.weights):>21} {_pair(layer.macs):>23}  {back}".rstrip()
            )
        if self.products[0]:
            lines.append(
                f"{'products of two values':<44} {'':>13} {'':>13} {'':>21} {_pair(self.products):>23}"
            )
        before, after = self.parameters
        lines.append(f"parameters {before:,} -> {after:,}, MACs {self.macs[0]:,} -> {self.macs[1]:,}")
        if before == after:
            lines.append(self._nothing())
        if self.difference is not None:
            lines.append(f"verified: largest difference {self.difference:.1e} of the largest output")
        return "\n".join(lines)

    def _nothing(self) -> str:
        """Say why nothing was removed."""
        held = self.given_back + sum(layer.tied for layer in self.layers)
        if held:
            return (
                f"nothing was removed: {held} output channels without effective weights are held by others;"
                " the last column says by which"
            )
        return (
            "nothing to remove: no channel is without effective weights (unstructured masks at a low sparsity"
            " leave every channel alive; use granularity='channel' or a higher sparsity)"
        )


def tabulate(
    graph: ChannelGraph,
    cut: Cut,
    old: nn.Module,
    new: nn.Module,
    difference: float | None,
    kept: Slices,
) -> Compaction:
    """Return the table of what was cut."""
    sizes: Mapping[str, torch.Tensor] = dict(new.named_parameters(remove_duplicate=False))
    layers, macs = [], _macs_of_positions(graph, cut)
    for name, kernels in graph.kernels.items():
        rows = cut.labels.rows[name] + torch.arange(kernels.outputs)
        columns = cut.labels.columns[name] + torch.arange(kernels.inputs)
        stayed = cut.dead[rows] & ~cut.is_gone(rows)
        back = stayed & ~cut.lives[cut.labels.root[rows]]
        held = zip(rows[back].tolist(), cut.labels.root[rows[back]].tolist(), strict=True)
        reasons = [cut.held.get(root) or cut.labels.reasons.get(label) for label, root in held]
        weights = sizes[name].numel() if name in sizes else 0
        if not weights:  # the branch that it was in is gone
            back, stayed = torch.zeros(2, len(rows), dtype=torch.bool)
        layers.append(
            CompactedLayer(
                name,
                (len(rows), int((~cut.is_gone(rows)).sum()) if weights else 0),
                (len(columns), int((~cut.is_gone(columns)).sum()) if weights else 0),
                (kernels.shape.numel(), weights),
                (kernels.macs, round(macs[name] * weights / kernels.shape.numel())),
                int(back.sum()),
                next((reason for reason in reasons if reason), "meets entries that cannot be removed"),
                int((stayed & ~back).sum()),
            )
        )
    sizes_of_all = (_count(old), _count(new))
    return Compaction(tuple(layers), sizes_of_all, difference, _products(graph, cut), kept)


def _macs_of_positions(graph: ChannelGraph, cut: Cut) -> dict[str, float]:
    """Return the multiply-adds of every parameter, with all its weights, at the positions that are left.

    Positions of one layer may be the channels of another, as those of a layer that mixes tokens are.
    """
    found = dict.fromkeys(graph.kernels, 0.0)
    for op in graph.ops:
        if isinstance(op, ir.Kernel) and op.weight.name in found:
            axis = len(op.output.shape) - 1 - (0 if op.window is None else len(op.window.kernel))
            sizes = zip(op.output.shape, cut.shape(op.output), strict=True)
            share = prod(new / old for place, (old, new) in enumerate(sizes) if place != axis and old)
            found[op.weight.name] += op.macs * share
    return found


def _products(graph: ChannelGraph, cut: Cut) -> tuple[int, int]:
    """The multiply-adds of products of two values, before and after.

    An axis of both has the size of the smaller one: where heads go, one side alone may be known to lose them.
    A product that no equation describes keeps its own.
    """
    before = after = 0
    for op in graph.ops:
        if not isinstance(op, ir.Mix):
            continue
        dense = dense_macs(op, graph.samples)
        old, new = dict[str, int](), dict[str, int]()
        letters = op.equation.partition("->")[0].split(",") if op.equation else ()
        for axes, value in zip(letters, op.inputs if letters else (), strict=True):
            for letter, size, left in zip(axes, value.shape, cut.shape(value), strict=True):
                if size > 1:
                    old[letter], new[letter] = size, min(left, new.get(letter, left))
        before += dense
        after += dense * prod(new.values()) // prod(old.values())
    return before, after


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _pair(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]:,} -> {numbers[1]:,}" if numbers[0] != numbers[1] else f"{numbers[0]:,}"
