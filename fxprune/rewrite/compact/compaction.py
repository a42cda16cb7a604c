"""Compact a network: remove the channels that no path uses, and keep its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture import capture
from fxprune.capture.errors import check_module
from fxprune.channels.follow import follow
from fxprune.graph import ChannelGraph, ir
from fxprune.lowering import lower
from fxprune.paths.count import reach
from fxprune.rewrite.compact.constant_operands import cut_constants
from fxprune.rewrite.compact.constants import Recorded, constant_entries, fold, is_recorded, record
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.leaves import leaf_of, open_leaf
from fxprune.rewrite.compact.literals import Rewriter
from fxprune.rewrite.compact.modules import Slices, is_sizeable, slice_parameters, slices_of
from fxprune.rewrite.compact.norms import kind_of
from fxprune.rewrite.compact.products import keep_what_counts, operand_nodes
from fxprune.rewrite.compact.recipe import record_recipe
from fxprune.rewrite.compact.table import tabulate
from fxprune.rewrite.compact.trial import (
    NodeFailure,
    OutputsDiffer,
    in_double,
    set_shapes,
    trial_inputs,
    verified,
)
from fxprune.rewrite.masking.finalize import finalize
from fxprune.rewrite.masking.finalize import plain as unmasked
from fxprune.rewrite.masking.parameters import read
from fxprune.sparsity.masks import Masks

__all__ = ["compact"]

ATTEMPTS = 64
"""How often channels are given back before a node that cannot be rewritten is an error."""


class HeldByLeaf(Exception):
    """Raised where a layer of several weights would have to get smaller inside; ``path`` is its own."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def compact(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    exact: bool = True,
    verify: bool = True,
    fold_constants: bool = True,
) -> fx.GraphModule:
    """Return a smaller network with the same outputs: channels that no path uses are gone.

    Args:
        model: a masked model, a finalized one, or any module with zeros in its weights; it is not changed.
        example_inputs: as in :func:`fxprune.apply`; not needed for what ``apply`` or ``capture`` returned.
        exact: let layer norms that lose channels compute what they computed with them. False gives plain
            norms over what is left, as retraining wants it; outputs then differ.
        verify: compare outputs in evaluation mode, and raise if they differ.
        fold_constants: move constants of removed channels into the biases of the layers that read them.

    Returns:
        A ``GraphModule`` of plain modules with fewer channels. ``meta["fxprune"]["compaction"]`` is a table
        by layer; what could not be removed stands there with the reason.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no path leads from the inputs to the outputs any more.
        RuntimeError: the outputs differ; the message names the first node that does.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_(), net[0].bias[:5].zero_()
        >>> small = fxprune.compact(net, torch.ones(2, 4))
        >>> small.get_submodule("0").weight.shape
        torch.Size([3, 4])
    """
    check_module(model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return _compact(model, example_inputs, exact, verify, fold_constants)


def _compact(
    model: nn.Module, example_inputs: Any, exact: bool, verify: bool, fold_constants: bool
) -> fx.GraphModule:
    plain = finalize(model)
    modes = {name: module.training for name, module in plain.named_modules()}
    has_shapes = isinstance(plain, fx.GraphModule) and all("val" in node.meta for node in plain.graph.nodes)
    gm = plain if isinstance(plain, fx.GraphModule) and has_shapes else capture(plain, example_inputs)
    gm.eval()
    known = read(model)
    runs = trial_inputs(gm, example_inputs, 0), trial_inputs(gm, example_inputs, 1)
    source, whole, opened = gm, set[str](), list[str]()
    while True:
        graph = lower(source)
        cut = _first_cut(graph, source, known)
        try:
            small, slices, found = _proved(
                gm, source, graph, cut, runs, whole, exact=exact, verify=verify, fold_constants=fold_constants
            )
            break
        except HeldByLeaf as held:
            wider = copy.deepcopy(source)
            if open_leaf(wider, held.path):
                set_shapes(wider, runs[0])
                source = wider
                opened.append(held.path)
            else:
                whole.add(held.path)
    small.meta = {**gm.meta}
    notes = dict(small.meta.get("fxprune", {}))
    parameters = {name: list(parameter.shape) for name, parameter in unmasked(model).named_parameters()}
    recipe = record_recipe(
        gm, source, small, slices, opened=opened, masked=list(known), parameters=parameters
    )
    recipes = [*notes.get("recipes", ()), recipe]
    table = tabulate(graph, cut, gm, small, found, slices)
    small.meta["fxprune"] = {**notes, "compaction": table, "recipes": recipes}
    for name, module in small.named_modules():
        module.train(modes.get(name, modes[""]))
    return small


def _proved(
    gm: fx.GraphModule,
    source: fx.GraphModule,
    graph: ChannelGraph,
    cut: Cut,
    runs: tuple[tuple[Any, ...], tuple[Any, ...]],
    whole: Collection[str],
    *,
    exact: bool,
    verify: bool,
    fold_constants: bool,
) -> tuple[fx.GraphModule, Slices, float | None]:
    """The smaller network and the largest difference of its outputs; what makes others is given back."""
    nodes = {node.name: node for node in source.graph.nodes}
    while True:
        small, slices = _smallest(source, graph, cut, runs, whole, exact=exact, fold_constants=fold_constants)
        if not (verify and exact):
            return small, slices, None

        def in_float64() -> fx.GraphModule:
            wide, both = copy.deepcopy(source).double(), (in_double(runs[0]), in_double(runs[1]))
            return _smallest(wide, graph, cut, both, whole, exact=exact, fold_constants=fold_constants)[0]

        try:
            return small, slices, verified(gm, small, runs, in_float64)
        except OutputsDiffer as error:
            start = nodes.get(error.node)
            reason = f"{error.node}: it would compute something else"
            if start is None or not _give_back_near(graph, cut, start, reason, attrgetter("all_input_nodes")):
                raise


def _first_cut(graph: ChannelGraph, gm: fx.GraphModule, known: Masks) -> Cut:
    """Return what could go by the masks alone (``known``: those of the model, if it has any)."""
    valueless = next((name for name in graph.kernels if gm.get_parameter(name).is_meta), None)
    if valueless is not None:
        raise ValueError(
            f"model: {valueless!r} has no values (it is on the meta device); load the weights first"
        )
    masks = {name: gm.get_parameter(name).detach() != 0 for name in graph.kernels}
    computed = _computed_weights(graph)
    masks |= {name: torch.ones_like(masks[name]) for name in computed}
    nonzero = dict(masks)
    if known:  # zeros that no mask holds may grow
        masks = {name: known.get(name, torch.ones_like(mask)) for name, mask in masks.items()}
    effective = reach(graph, masks, resolution="channel")
    if graph.kernels and not any(bool(mask.any()) for mask in effective.values()):
        empty = [name for name, mask in masks.items() if not bool(mask.any())] or list(masks)
        raise ValueError(
            f"model: no path leads from its inputs to its outputs; without weights on a path: "
            f"{', '.join(empty[:10])}; prune less, or with on_collapse='repair'"
        )
    cut = Cut(graph, follow(graph), effective, nonzero)
    for sides in cut.labels.sides:
        if sides.name in computed:
            labels = torch.cat([sides.rows, sides.columns])
            cut.give_back(labels, f"{sides.name}: the layer computes its weight from all of it")
    return cut


def _computed_weights(graph: ChannelGraph) -> set[str]:
    """The parameters that some layer reads otherwise than as they are: zeros in them tell nothing."""
    return {
        op.weight.name
        for op in graph.ops
        if isinstance(op, ir.Kernel) and op.weight.computed and op.weight.name is not None
    }


def _smallest(
    gm: fx.GraphModule,
    graph: ChannelGraph,
    cut: Cut,
    runs: tuple[tuple[Any, ...], tuple[Any, ...]],
    whole: Collection[str],
    *,
    exact: bool,
    fold_constants: bool,
) -> tuple[fx.GraphModule, Slices]:
    """Rewrite a copy; where a node does not run, give its channels back and try again.

    ``whole``: the paths of layers that cannot be opened. `HeldByLeaf` asks for another to be opened.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    recorded = record(gm, runs, _sources(graph, nodes, cut))
    for _ in range(ATTEMPTS):
        try:
            sums, biases = _constants(
                graph, gm, nodes, cut, recorded, exact=exact, fold_constants=fold_constants
            )
            slices = slices_of(graph, gm, cut)
            odd = next((name for name in slices if not is_sizeable(gm, name)), None)
            if odd is not None:
                leaf = leaf_of(gm, odd)
                if leaf is not None and leaf not in whole:
                    raise HeldByLeaf(leaf)
                _give_back_users(graph, cut, odd, f"{odd}: a module of unknown kind holds it")
                continue
            small = copy.deepcopy(gm)
            Rewriter(graph, small, cut, sums, slices).run()
            cut_constants(graph, small, cut, slices)
            slice_parameters(small, slices, biases, _groups(graph, nodes, cut))
            set_shapes(small, runs[0])
            return small, slices
        except UnevenCut as error:
            if not cut.give_back(error.labels, str(error)):
                raise RuntimeError(f"compact: {error}") from error
        except NodeFailure as error:
            if not _give_back_node(graph, cut, nodes, error):
                raise RuntimeError(f"compact: node {error}") from error
    raise RuntimeError(f"compact: no consistent cut in {ATTEMPTS} attempts; please report the network")


def _constants(
    graph: ChannelGraph,
    gm: fx.GraphModule,
    nodes: dict[str, fx.Node],
    cut: Cut,
    recorded: Recorded,
    *,
    exact: bool,
    fold_constants: bool,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return what norms lose and what biases gain.

    What one reader gives back, another may have counted already: so all are asked until nothing changes.
    """
    while True:
        before = cut.gone.clone()
        sums = _removed_sums(graph, nodes, cut, recorded) if exact else {}
        biases = fold(graph, gm, cut, recorded, fold_constants=fold_constants)
        keep_what_counts(graph, cut, recorded)
        if torch.equal(before, cut.gone):
            return sums, biases


def _sources(graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut) -> set[str]:
    """The nodes whose numbers are asked for: what layers and norms read of channels that may go."""
    wanted = operand_nodes(graph, cut)
    for op in graph.ops:
        if isinstance(op, (ir.Kernel, ir.Norm)) and op.node in nodes and cut.touches(op.inputs[0]):
            source = nodes[op.node].args[0] if nodes[op.node].args else None
            if isinstance(source, fx.Node):
                wanted.add(source.name)
    return wanted


def _removed_sums(
    graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut, recorded: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums of what each norm loses, and of their squares; give back where these are no constants."""
    sums = {}
    for op in graph.ops:
        if not isinstance(op, ir.Norm) or not op.axes:
            continue
        value = op.inputs[0]
        shrinking = [axis for axis in op.axes if cut.kept_along(value, axis) is not None]
        if not shrinking:
            continue
        node = nodes[op.node]
        source = node.args[0] if node.args else None
        kind = kind_of(node)
        axis = {"layer": len(value.shape) - 1, "group": 1}.get(kind, -1)
        known = is_recorded(graph, source, value, recorded)
        if shrinking != [axis] or not known or (kind == "layer" and op.axes != (axis,)):
            cut.give_back(cut.labels_of(value), f"{op.layer or op.node}: a statistic over channels")
            continue
        assert isinstance(source, fx.Node)
        found = _removed_sum(op, axis, recorded[source.name], cut)
        if found is not None:
            sums[op.node] = found
    return sums


def _removed_sum(
    op: ir.Norm, axis: int, values: tuple[Tensor, Tensor], cut: Cut
) -> tuple[Tensor, Tensor] | None:
    """The sums of what one norm loses along ``axis``; ``None`` if nothing is left to lose."""
    value, place = op.inputs[0], f"{op.layer or op.node}: a statistic over channels"
    kept = cut.kept_along(value, axis)
    assert kept is not None
    entries, same = constant_entries(values, axis, ~kept)
    first = values[0].movedim(axis, -1)
    if axis == 1:  # images of any size: one number for all positions
        same &= (entries == entries[:, :1]).all(1)
    elif first.dim() > 2:
        same &= (first[..., ~kept] == first[:1, ..., ~kept]).flatten(0, -2).all(0)
    if not bool(same.all()):
        along = next(f.labels.flatten() for f in cut.labels.values[value.index] if f.axes == (axis,))
        cut.give_back(along[~kept][~same], place)
        kept = cut.kept_along(value, axis)
        if kept is None:
            return None
    if axis == 1:
        one = first.flatten(0, -2)[0].where(~kept, 0.0).view(op.groups, -1)
        left = kept.view(op.groups, -1).any(1)
        return one[left].sum(1, keepdim=True), one[left].square().sum(1, keepdim=True)
    rows = first[..., ~kept]
    one = rows[:1] if rows.dim() > 1 else rows
    if bool((one == one.flatten(0, -2)[:1]).all()):
        one = one.flatten(0, -2)[0]
    return one.sum(-1, keepdim=True), one.square().sum(-1, keepdim=True)


def _groups(graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut) -> dict[str, int]:
    """The number of groups that are left of every grouped convolution, by the layer's path."""
    found = {}
    for sides in cut.labels.sides:
        op = graph.ops[sides.op]
        assert isinstance(op, ir.Kernel)
        if op.groups > 1 and nodes[op.node].op == "call_module":
            left = (~cut.is_gone(sides.rows)).view(op.groups, -1).any(1)
            found[str(nodes[op.node].target)] = int(left.sum())
    return found


def _give_back_users(graph: ChannelGraph, cut: Cut, name: str, reason: str) -> None:
    for op in graph.ops:
        if any(use.name == name for use in op.params):
            for value in (*op.inputs, op.output):
                cut.give_back(cut.labels_of(value), reason)


def _give_back_node(graph: ChannelGraph, cut: Cut, nodes: dict[str, fx.Node], error: NodeFailure) -> bool:
    """Give back what a node that failed reads and makes, or else what the nodes before or behind it do."""
    name = error.node.removeprefix("narrowed_")
    if name not in nodes:
        return False
    reason = f"{error.node}: {str(error.__cause__)[:80]}"
    return _give_back_near(graph, cut, nodes[name], reason, attrgetter("all_input_nodes")) or (
        _give_back_near(graph, cut, nodes[name], reason, lambda node: list(node.users))
    )


def _give_back_near(
    graph: ChannelGraph, cut: Cut, start: fx.Node, reason: str, step: Callable[[fx.Node], list[fx.Node]]
) -> bool:
    """Give back the channels of the first nodes, ``step`` by ``step`` from ``start``, that have any."""
    near = [start]
    seen = set(near)
    while near:
        found = False
        for node in near:
            values = {
                value.index: value
                for op in graph.ops
                if op.node == node.name
                for value in (*op.inputs, op.output)
            }
            for source in (node, *node.all_input_nodes):
                value = graph.results.get(source.name)
                if isinstance(value, ir.Value):
                    values[value.index] = value
            for value in values.values():
                found |= cut.give_back(cut.labels_of(value), reason)
        if found:
            return True
        near = list(dict.fromkeys(new for node in near for new in step(node) if new not in seen))
        seen |= set(near)
    return False
