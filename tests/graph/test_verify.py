"""Graphs with one fault each are refused, with the op and the fault in the message; whole graphs pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.graph import ChannelGraph, ir
from fxprune.graph.index_map import CONSTANT, ZERO
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction

OpType = TypeVar("OpType", bound=ir.Op)


class Everything(nn.Module):
    """Every kind of op, a grouped and a transposed convolution, literals, pads, tables and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.pad = nn.ZeroPad2d(1)
        self.head = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.ones(6))
        self.token = nn.Parameter(torch.ones(1, 1, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x))
        x = x * self.grouped(x).sigmoid()
        x = self.pool(self.pad(self.up(x)))
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        a, b = self.head(x).split(3, 2)
        mixed = (a @ b.transpose(1, 2)).softmax(-1) @ x
        x = x + mixed * self.gamma
        return x.sum(1), torch.linalg.lu_factor(x)[0]


def everything() -> tuple[fx.GraphModule, ChannelGraph]:
    gm = fxprune.capture(Everything(), torch.ones(2, 3, 8, 8))
    return gm, fxprune.lower(gm)


def first(graph: ChannelGraph, kind: type[OpType], where: Callable[[Any], bool] = lambda op: True) -> OpType:
    return next(op for op in graph.ops if isinstance(op, kind) and where(op))


def changed(graph: ChannelGraph, op: ir.Op, **fields: Any) -> ChannelGraph:
    """The graph with other fields in one op."""
    ops = tuple(replace(one, **fields) if one is op else one for one in graph.ops)
    return replace(graph, ops=ops)


def reshaped(graph: ChannelGraph, op: ir.Op, *shape: int) -> ChannelGraph:
    """The graph with another output shape of one op, which all readers and nodes see."""
    old, new = op.output, replace(op.output, shape=shape)

    def swap(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(swap(item) for item in x)
        return new if x == old else x

    ops = tuple(replace(one, inputs=swap(one.inputs), output=swap(one.output)) for one in graph.ops)
    return replace(graph, ops=ops, results={name: swap(result) for name, result in graph.results.items()})


def kernel(graph: ChannelGraph, layer: str) -> ir.Kernel:
    return first(graph, ir.Kernel, lambda op: op.layer == layer)


def gather(graph: ChannelGraph, node: str) -> ir.Gather:
    return first(graph, ir.Gather, lambda op: op.node == node)


def of_kernel_set(graph: ChannelGraph, name: str, /, **fields: Any) -> ChannelGraph:
    return replace(graph, kernels=graph.kernels | {name: replace(graph.kernels[name], **fields)})


def with_use(graph: ChannelGraph, layer: str, axis: int, along: ir.AxisUse) -> ChannelGraph:
    """The graph whose layer reads an axis of its weight along something else."""
    op = kernel(graph, layer)
    use = op.params[0]
    axes = (*use.axes[:axis], along, *use.axes[axis + 1 :])
    return changed(graph, op, params=(replace(use, axes=axes), *op.params[1:]))


def literal(graph: ChannelGraph, **fields: Any) -> ChannelGraph:
    op = first(graph, ir.Gather, lambda op: bool(op.literals))
    return changed(graph, op, literals=(replace(op.literals[0], **fields),))


def windowed(graph: ChannelGraph, layer: str, **fields: Any) -> ChannelGraph:
    op = kernel(graph, layer)
    assert op.window is not None
    return changed(graph, op, window=replace(op.window, **fields))


def mixing(equation: str) -> Callable[[ChannelGraph], ChannelGraph]:
    return lambda graph: changed(graph, first(graph, ir.Mix), equation=equation)


def halves(x: Tensor) -> Tensor:
    return x / 2


def without(graph: ChannelGraph, op: ir.Op) -> ChannelGraph:
    return replace(graph, ops=tuple(one for one in graph.ops if one is not op))


def again(graph: ChannelGraph) -> ChannelGraph:
    return replace(graph, ops=(*graph.ops, first(graph, ir.Map)))


def dead(value: ir.Value) -> ir.Value:
    return replace(value, live=not value.live)


def of_product(graph: ChannelGraph, function: Any) -> ChannelGraph:
    product = TensorFunction.of(function, Operand(0), Operand(1))
    return changed(graph, first(graph, ir.Mix), equation="", product=product)


def of_window(graph: ChannelGraph, function: Any) -> ChannelGraph:
    op = first(graph, ir.Pool, lambda op: op.window is not None)
    assert op.window is not None
    return changed(graph, op, window=replace(op.window, own=TensorFunction.of(function, PREVIOUS)))


FAULTS: dict[str, tuple[Callable[[ChannelGraph], ChannelGraph], str]] = {
    # values
    "an input that nobody makes": (
        lambda g: without(g, kernel(g, "stem")),
        r"op %2 Norm \(node 'norm', layer 'norm'\): reads %1, which no op before it makes",
    ),
    "an input of another shape": (
        lambda g: changed(g, kernel(g, "grouped"), inputs=(ir.Value(2, (9, 9), True),)),
        "Kernel .*'grouped'.*: reads Value.index=2, shape=.9, 9., live=True., which was made as",
    ),
    "a value made twice": (again, "Map .*: makes %.* a second time"),
    "an input too many": (
        lambda g: changed(g, first(g, ir.Norm), inputs=first(g, ir.Norm).inputs * 2),
        "Norm .*: has 2 inputs, not 1",
    ),
    "paths from nowhere": (
        lambda g: changed(g, kernel(g, "stem"), output=dead(kernel(g, "stem").output)),
        "Kernel .*'stem'.*: its output is not live, its inputs are",
    ),
    # origins
    "no node": (lambda g: changed(g, first(g, ir.Norm), node=""), "Norm .*: names no node"),
    "a node that is not there": (
        lambda g: changed(g, first(g, ir.Norm), node="nowhere"),
        "Norm .node 'nowhere'.*: no such node yields a tensor",
    ),
    "a node that yields what nobody makes": (
        lambda g: replace(g, results=g.results | {"norm": ir.Value(999, (2, 4, 4, 4), True)}),
        "node 'norm': yields %999",
    ),
    # parameters by axis
    "an axis too few": (
        lambda g: changed(g, kernel(g, "head"), params=(ir.ParamUse("head.weight", (None,)),)),
        "Kernel .*'head'.*: reads 'head.weight' of 2 axes along 1",
    ),
    "a value that the op does not touch": (
        lambda g: with_use(g, "head", 0, ir.AxisUse(0, (1,))),
        "axis 0 of 'head.weight' runs along %0, which is no input and not the output",
    ),
    "an axis that the value has not": (
        lambda g: with_use(g, "head", 0, ir.AxisUse(kernel(g, "head").output.index, (3,))),
        "axis 0 of 'head.weight' runs along axes .3,. of a value of shape",
    ),
    "an axis of another length": (
        lambda g: with_use(g, "head", 0, ir.AxisUse(kernel(g, "head").output.index, (0,))),
        "axis 0 of 'head.weight' has 6 entries, the axes that it runs along 2",
    ),
    "an index that is too short": (
        lambda g: with_use(g, "head", 0, ir.AxisUse(kernel(g, "head").output.index, (2,), (0, 1))),
        "axis 0 of 'head.weight' is indexed by 2 entries, not 6",
    ),
    "an index beyond the end": (
        lambda g: with_use(g, "head", 0, ir.AxisUse(kernel(g, "head").output.index, (2,), (6,) * 6)),
        "axis 0 of 'head.weight' is indexed beyond its 6 entries",
    ),
    # kinds
    "a pattern of another shape": (
        lambda g: changed(g, first(g, ir.Source), pattern=torch.ones(3, dtype=torch.bool)),
        "Source .*: its pattern has shape .3,., not .2, 3, 8, 8",
    ),
    "a pattern of numbers": (
        lambda g: changed(g, first(g, ir.Source), pattern=torch.ones(2, 3, 8, 8)),
        "Source .*: its pattern is of torch.float32, not bool",
    ),
    "a weight of another shape": (
        lambda g: changed(g, kernel(g, "head"), weight=replace(kernel(g, "head").weight, shape=(6, 5))),
        r"Kernel .*'head'.*: a weight of shape \(6, 5\) in 1 groups maps",
    ),
    "a weight without taps": (
        lambda g: changed(g, kernel(g, "stem"), weight=replace(kernel(g, "stem").weight, shape=(4, 3))),
        r"Kernel .*'stem'.*: a weight of shape \(4, 3\) with 2 axes of taps maps",
    ),
    "other groups": (
        lambda g: changed(g, kernel(g, "grouped"), groups=1),
        r"Kernel .*'grouped'.*: a weight of shape \(4, 2, 3, 3\) in 1 groups maps",
    ),
    "other groups of a transposed convolution": (
        lambda g: changed(g, kernel(g, "up"), groups=1),
        r"Kernel .*'up'.*: a weight of shape \(4, 3, 2, 2\) in 1 groups maps",
    ),
    "another batch": (lambda g: reshaped(g, kernel(g, "stem"), 3, 4, 4, 4), "'stem'.*before the channels"),
    "another stride": (
        lambda g: windowed(g, "stem", stride=(1, 1)),
        r"Kernel .*'stem'.*: its window gives positions \(8, 8\), not \(4, 4\)",
    ),
    "another stride of a transposed convolution": (
        lambda g: windowed(g, "up", stride=(1, 1)),
        r"Kernel .*'up'.*: its window gives positions \(5, 5\), not \(8, 8\)",
    ),
    "another window": (lambda g: windowed(g, "stem", kernel=(3, 1)), r"'stem'.*: its window has taps"),
    "live taps of another shape": (
        lambda g: changed(g, kernel(g, "stem"), live_taps=torch.ones(3)),
        "'stem'.*: its live taps have shape",
    ),
    "a sum of other shapes": (
        lambda g: changed(g, first(g, ir.Sum), inputs=(first(g, ir.Sum).inputs[0], g.ops[0].output)),
        "Sum .*: with its inputs it broadcasts to None",
    ),
    "a movement of another shape": (
        lambda g: changed(g, gather(g, "flatten"), move=TensorFunction.of("flatten", PREVIOUS, 1)),
        r"Gather .*'flatten'.*: its movement gives shape",
    ),
    "a movement that fails": (
        lambda g: changed(g, gather(g, "flatten"), move=TensorFunction.of("flatten", PREVIOUS, 9)),
        r"Gather .*'flatten'.*: flatten.x0, 9. fails on its inputs: Dimension out of range",
    ),
    "a movement that gives no tensor": (
        lambda g: changed(g, gather(g, "flatten"), move=TensorFunction.of("tolist", PREVIOUS)),
        r"Gather .*'flatten'.*: tolist",
    ),
    "a movement that computes": (
        lambda g: changed(g, gather(g, "flatten"), move=gather(g, "flatten").move.then(halves, PREVIOUS)),
        "Gather .*'flatten'.*: its movement does more than to copy entries",
    ),
    "a movement that gives other numbers": (
        lambda g: changed(g, gather(g, "flatten"), move=gather(g, "flatten").move.then("mul", PREVIOUS, 9)),
        "Gather .*'flatten'.*: its index map reads beyond the 300 entries of its inputs",
    ),
    "other pads": (
        lambda g: changed(g, gather(g, "pad"), pads=((2, 1, 2), (3, 1, 1))),
        r"Gather .*'pad'.*: axis 2 padded by 1 and 2 has 11 entries, not",
    ),
    "a pad on no axis": (lambda g: changed(g, gather(g, "pad"), pads=((4, 0, 0),)), "'pad'.*: axis 4 padded"),
    "a literal on no axis": (lambda g: literal(g, axis=7), "literal 3 .size of output axis 7. names no axis"),
    "a literal that is too small": (lambda g: literal(g, value=2), "literal 2 .* is less than its 3 entries"),
    "a position that is not there": (
        lambda g: literal(g, role="index", value=-8),
        "literal -8 .index of output axis 2. is beyond its 3 entries",
    ),
    "no parts": (lambda g: literal(g, role="parts", value=0), "literal 0 .parts .* makes no parts"),
    "an equation with an axis too few": (mixing("bq,bck->bqk"), "Mix .*: 'bq' of .* has 2 axes"),
    "an equation of other sizes": (mixing("bqc,bqk->bk"), "Mix .*: 'q' of .* has both 26 and 3 entries"),
    "an equation from nowhere": (mixing("bqc,bck->bqz"), "Mix .*: .* gives axes that no input has"),
    "an equation of another shape": (mixing("bqc,bck->bqc"), "Mix .*: 'bqc,bck->bqc' gives shape"),
    "no product": (
        lambda g: changed(g, first(g, ir.Mix), equation=""),
        "Mix .*: has no product",
    ),
    "a product of another shape": (
        lambda g: of_product(g, torch.Tensor.__getitem__),
        "Mix .*: .*fails on its inputs",
    ),
    "an axis that is not pooled": (
        lambda g: changed(g, first(g, ir.Pool, lambda op: op.window is None), dims=(2,)),
        "Pool .*: it gives",
    ),
    "an axis kept": (
        lambda g: changed(g, first(g, ir.Pool, lambda op: op.window is None), keepdim=True),
        "Pool .*: it gives",
    ),
    "another pool": (lambda g: of_window(g, torch.relu), "Pool .*: its window gives"),
    "axes that the input has not": (
        lambda g: changed(g, first(g, ir.Map, lambda op: op.axes), axes=(3,)),
        r"Map .*: axes \(3,\) are not in order, or its input has only 3",
    ),
    "axes out of order": (lambda g: changed(g, first(g, ir.Norm), axes=(3, 1)), r"Norm .*: axes \(3, 1\)"),
    "groups of a norm": (
        lambda g: changed(g, first(g, ir.Norm), groups=3),
        r"Norm .*: axis 1 of a value of shape \(2, 4, 4, 4\) has no 3 equal groups",
    ),
    "a scale that shrinks": (
        lambda g: reshaped(g, first(g, ir.Affine), 2, 26, 1),
        "Affine .*: with its inputs it broadcasts to",
    ),
    "a function that grows": (
        lambda g: reshaped(g, first(g, ir.Map), 4, 4, 4),
        "Map .*: its input has shape",
    ),
    "no reason": (lambda g: changed(g, first(g, ir.Opaque), reason=""), "Opaque .*: gives no reason"),
    "outputs of a shape": (
        lambda g: changed(g, g.ops[-1], output=replace(g.ops[-1].output, shape=(2,))),
        "Sink .*: its output has shape",
    ),
    # kernel sets
    "a kernel set that is not there": (
        lambda g: replace(g, kernels={n: k for n, k in g.kernels.items() if n != "head.weight"}),
        "Kernel: no kernel set 'head.weight'",
    ),
    "a kernel set of another name": (
        lambda g: of_kernel_set(g, "head.weight", name="tail.weight"),
        "kernel set 'head.weight': is named 'tail.weight'",
    ),
    "uses that are not there": (
        lambda g: of_kernel_set(g, "head.weight", uses=2),
        "kernel set 'head.weight': counts 2 uses, 1 ops read it",
    ),
    "multiply-adds that nobody does": (
        lambda g: of_kernel_set(g, "head.weight", macs=1),
        "kernel set 'head.weight': counts 1 multiply-adds, its ops 936",
    ),
    "a space of another size": (
        lambda g: of_kernel_set(g, "up.weight", in_space=ir.Space("grouped", 6)),
        r"kernel set 'up.weight': its spaces make \(6, 3\), not \(4, 3\)",
    ),
    "spaces that have no groups": (
        lambda g: of_kernel_set(g, "grouped.weight", in_space=ir.Space("norm", 5)),
        "kernel set 'grouped.weight': spaces of 5 and 4 channels have no 2 equal groups",
    ),
    "live taps that are numbers": (
        lambda g: of_kernel_set(g, "stem.weight", live_taps=torch.ones(3, 3)),
        "kernel set 'stem.weight': its live taps are of torch.float32, not bool",
    ),
}


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return everything()[1]


def test_a_whole_graph_passes_and_has_every_kind() -> None:
    gm, graph = everything()
    graph.verify()
    graph.verify(gm)
    assert {op.kind for op in graph.ops} == {kind.__name__ for kind in ir.AnyOp.__args__[:]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault: str, graph: ChannelGraph) -> None:
    broken, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as caught:
        broken(graph).verify()
    assert "\n" not in str(caught.value)


def test_the_captured_network_tells_more() -> None:
    gm, graph = everything()
    node = changed(graph, first(graph, ir.Norm), node="nowhere")
    with pytest.raises(ValueError, match=r"node 'nowhere'.*: the captured graph has no such node"):
        node.verify(gm)
    unknown = changed(graph, first(graph, ir.Norm), params=(ir.ParamUse("norm.scale", (None,)),))
    unknown.verify()
    with pytest.raises(ValueError, match=r"reads 'norm.scale', which is no parameter or buffer"):
        unknown.verify(gm)
    longer = changed(graph, first(graph, ir.Norm), params=(ir.ParamUse("norm.weight", (None, None)),))
    with pytest.raises(ValueError, match=r"reads 'norm.weight' of 1 axes along 2"):
        longer.verify(gm)
    other = replace(graph, results=graph.results | {"norm": graph.results["flatten"]})
    with pytest.raises(ValueError, match=r"node 'norm': yields .* captured as"):
        other.verify(gm)


def test_an_index_map_must_lead_to_the_inputs(graph: ChannelGraph) -> None:
    op = gather(graph, "flatten")
    other = changed(graph, op)
    place = other.ops[graph.ops.index(op)]
    found = op.index_map()
    vars(place)["_index_map"] = replace(found, parts=(), flat=found.flat_index() + 1)
    with pytest.raises(ValueError, match=r"Gather .*: its index map reads beyond"):
        other.verify()
    vars(place)["_index_map"] = replace(found, parts=(), flat=found.flat_index().flip(0))
    with pytest.raises(ValueError, match=r"Gather .*: its movement does more than to copy entries"):
        other.verify()


def test_lowering_in_tests_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own ``lower`` is the one that calls ``verify``."""
    seen: list[Any] = []
    monkeypatch.setattr(ChannelGraph, "verify", lambda graph, gm: seen.append((graph, gm)))
    gm, graph = everything()
    assert seen == [(graph, gm)]
    fxprune.apply(nn.Linear(4, 2), "magnitude", 0.5, example_inputs=torch.ones(1, 4), progress=False)
    assert len(seen) == 2


def test_constants_that_are_joined_to_inputs_are_shapes_as_well() -> None:
    class Joins(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            own = torch.cat([index, torch.arange(x.shape[0])])
            return x.new_zeros(x.shape).index_add(0, own, x[own])

    graph = fxprune.lower(fxprune.capture(Joins(), (torch.randn(3, 4), torch.tensor([0, 2, 1]))))
    (joined,) = [op for op in graph.ops if isinstance(op, ir.Gather) and op.node == "cat"]
    assert joined.index_map().flat_index().tolist() == [0, 1, 2, ZERO, CONSTANT, CONSTANT]
    graph.verify()
