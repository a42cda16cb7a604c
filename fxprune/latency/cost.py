"""Predict how long a network takes without some of its channel groups, from the times of its layers."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from fxprune.channels.cost import Cost, Term
from fxprune.channels.groups import Groups
from fxprune.channels.memory import count_memory, live_ranges
from fxprune.graph import ir
from fxprune.latency.bench import measure
from fxprune.latency.layers import Layer, Widths, layer_of, time_layer, time_whole
from fxprune.latency.runtimes import onnx_session
from fxprune.latency.table import Table, machine, open_table
from fxprune.rewrite.compact import compact

__all__ = ["Latency", "TimedLayer", "fit", "latency_cost"]

SECONDS = 0.4
"""How long a whole network is measured."""

SLOW = 1.25
"""Times on disk that are so many times those of now were measured while the machine had other work."""


@dataclass(frozen=True, eq=False)
class TimedLayer:
    """A use of a layer: the groups of its ``rows`` and ``columns``, and its times by width (milliseconds)."""

    name: str
    rows: Tensor
    columns: Tensor
    widths: Widths

    def left(self, stays: Tensor) -> float:
        """The time at the widths that are left; ``stays`` (groups + 1,) is 1.0 for what stays, else 0.0."""
        outputs, inputs = float(stays[self.rows].sum()), float(stays[self.columns].sum())
        return self.widths.at(outputs, inputs) if outputs and inputs else 0.0

    def saved(self, stays: Tensor) -> Tensor:
        """Return what one group less saves, by the slope of the times."""
        rows, columns = stays[self.rows], stays[self.columns]
        by_output, by_input = self.widths.slopes(float(rows.sum()), float(columns.sum()))
        saved = torch.zeros_like(stays)
        saved.index_add_(0, self.rows, rows * by_output)
        saved.index_add_(0, self.columns, columns * by_input)
        return saved


@dataclass(frozen=True, eq=False)
class Latency:
    """Hold predicted milliseconds as a cost: ``layers``, and all else by the bytes of activations.

    Layers take ``scale`` times what they do alone; all else takes ``fixed`` milliseconds, and ``per_byte`` of
    what ``activations`` counts. It answers the questions that a :class:`fxprune.channels.cost.Cost` does.
    """

    groups: int
    layers: tuple[TimedLayer, ...]
    activations: Cost
    fixed: float = 0.0
    per_byte: float = 0.0
    scale: float = 1.0

    def left(self, staying: Tensor) -> float:
        """Return the milliseconds of the network in which only the groups in ``staying`` (bool) are left."""
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        rest = self.fixed + self.per_byte * self.activations.left(staying)
        return rest + self.scale * sum(layer.left(stays) for layer in self.layers)

    def towards(self, staying: Tensor, level: float) -> Tensor:
        """Return the milliseconds that each group takes with it, by the slopes of the times."""
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        saved = self.per_byte * self.activations.saved(staying)
        for layer in self.layers:
            saved += self.scale * layer.saved(stays)[: self.groups]
        return saved

    def of_layer(self, name: str, staying: Tensor) -> float:
        """Return the milliseconds of all uses of one parameter."""
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        return self.scale * sum(layer.left(stays) for layer in self.layers if layer.name == name)

    @cached_property
    def whole(self) -> float:
        """The milliseconds of the whole network."""
        return self.left(torch.ones(self.groups, dtype=torch.bool))


def latency_cost(gm: fx.GraphModule, groups: Groups, runtime: str, threads: int | None) -> Latency:
    """Return the cost that is the time of a captured network in a runtime, measured on this machine.

    Every distinct layer is timed at a grid of widths; the whole network and one with half of the channels
    show what all else takes. Times are kept on disk. Of what is kept each whole layer, and under "eager" the
    whole network, is timed once more: where it takes much less than it did, other work slowed it then, and it
    is measured anew.
    """
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))
    threads = threads or torch.get_num_threads()
    table = open_table(machine(device, runtime, threads))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            layers = _timed(gm, groups, table, device, runtime, threads)
    finally:
        torch.set_num_threads(before)
    sizes = count_memory(live_ranges(gm, groups.graph), groups).sizes
    terms = tuple(Term(size.unit * groups.graph.samples, size.parts) for size in sizes)
    bare = Latency(groups.count, layers, Cost(groups.count, 0.0, terms))
    fixed, per_byte, scale = fit(*_whole_and_half(gm, bare, groups, table, runtime, threads))
    return replace(bare, fixed=fixed, per_byte=per_byte, scale=scale)


def _timed(
    gm: fx.GraphModule, groups: Groups, table: Table, device: torch.device, runtime: str, threads: int
) -> tuple[TimedLayer, ...]:
    """All uses of layers; those that the table does not know, or that take less by now, are timed first."""
    by_label = groups.numbers.where(groups.numbers >= 0, groups.count)
    dtype = next((p.dtype for p in gm.parameters() if p.is_floating_point()), torch.float32)
    session = onnx_session(threads) if runtime == "onnxruntime" else None
    found, new, looked_at = [], False, set[str]()
    for side in groups.labels.sides:
        op = groups.graph.ops[side.op]
        assert isinstance(op, ir.Kernel)
        layer: Layer = layer_of(op, len(side.rows), len(side.columns), dtype)
        key = layer.key()
        if key not in table.layers:
            table.layers[key] = time_layer(layer, device, session)
            new = True
        elif key not in looked_at and table.layers[key].whole > SLOW * time_whole(layer, device, session):
            # Other work on the machine only adds: the smaller time of two is the better one.
            table.layers[key] = table.layers[key].least(time_layer(layer, device, session))
            new = True
        looked_at.add(key)
        columns = by_label[side.rows] if layer.is_depthwise else by_label[side.columns]
        widths = table.layers[key]
        found.append(TimedLayer(side.name or op.node, by_label[side.rows], columns, widths))
    if new:
        table.save()
    return tuple(found)


def _whole_and_half(
    gm: fx.GraphModule, bare: Latency, groups: Groups, table: Table, runtime: str, threads: int
) -> list[tuple[float, ...]]:
    """Bytes of activations, milliseconds of layers alone, and measured: of the network, and of half of it."""
    facts = [f"{layer.name} {len(layer.rows)} {len(layer.columns)} {layer.widths}" for layer in bare.layers]
    text = "\n".join([*facts, *(f"{node.op} {node.target}" for node in gm.graph.nodes)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    known = table.networks.get(digest)
    if known is None or (runtime == "eager" and known[0][2] > SLOW * _least(gm, groups, threads)):
        half = _half(groups)
        small = compact(_without(gm, groups, half), exact=False, verify=False, progress=False)
        times = measure(
            {"whole": gm, "half": small}, batch=(groups.graph.samples,), runtimes=(runtime,),
            threads=threads, seconds=SECONDS,
        )  # fmt: skip
        every = torch.ones(groups.count, dtype=torch.bool)
        table.networks[digest] = [
            # As layers are timed: other work on the machine only adds.
            (bare.activations.left(staying), bare.left(staying), min(time.milliseconds))
            for staying, time in zip((every, half), times, strict=True)
        ]
        table.save()
    return table.networks[digest]


def _least(gm: fx.GraphModule, groups: Groups, threads: int) -> float:
    """The shortest time of a network in a few runs, in milliseconds."""
    batch = (groups.graph.samples,)
    return min(measure({"whole": gm}, batch=batch, threads=threads, seconds=SECONDS / 8)[0].milliseconds)


def _half(groups: Groups) -> Tensor:
    """The first half of the groups of every family."""
    staying = torch.ones(groups.count, dtype=torch.bool)
    for family in torch.unique(groups.families).tolist():
        members = (groups.families == family).nonzero().flatten()
        staying[members[(len(members) + 1) // 2 :]] = False
    return staying


def _without(gm: fx.GraphModule, groups: Groups, staying: Tensor) -> fx.GraphModule:
    """A copy of a network whose weights are zero where groups are gone, and small noise where they stay."""
    smaller = copy.deepcopy(gm)
    with torch.no_grad():
        for name in groups.graph.kernels:
            weight = smaller.get_parameter(name)
            weight.add_((weight == 0) * 1e-3)
            weight.mul_(groups.kept(name, staying).to(weight.device))
    return smaller


def fit(whole: tuple[float, ...], half: tuple[float, ...]) -> tuple[float, float, float]:
    """Return the fixed milliseconds, those for each byte of activations, and the scale of layers.

    Args:
        whole, half: of two networks, the bytes of activations, the milliseconds of all layers by themselves,
            and those that were measured of the network. Both are met, if none of the numbers is negative.

    >>> fit((100.0, 5.0, 9.0), (50.0, 3.0, 6.0))  # 9 - 5 and 6 - 3 milliseconds are not in layers
    (2.0, 0.02, 1.0)
    >>> fit((100.0, 5.0, 4.0), (50.0, 3.0, 3.0))  # in the network, layers are faster than alone
    (1.5, 0.0, 0.5)
    """
    (bytes_, layers, time), (fewer, smaller, shorter) = whole, half
    if bytes_ <= fewer:
        return time - layers, 0.0, 1.0
    slope = ((time - layers) - (shorter - smaller)) / (bytes_ - fewer)
    if slope >= 0:
        return time - layers - slope * bytes_, slope, 1.0
    scale = (time - shorter) / (layers - smaller) if time > shorter and layers > smaller else 1.0
    return time - scale * layers, 0.0, scale
