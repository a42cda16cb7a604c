"""Compact a network: remove the channels that no path uses, and keep its outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fxprune.arguments import check_flags
from fxprune.capture import calls_whole, capture, renamed
from fxprune.capture.errors import InputError, check_module, first_line
from fxprune.channels.follow import follow
from fxprune.finite import warn_of_strange_parameters
from fxprune.graph import ChannelGraph, ir
from fxprune.keywords import refuse_unknown
from fxprune.lowering import lower
from fxprune.lowering.norm_statistics import counted_nodes, kind_of
from fxprune.paths.used import used_channels
from fxprune.progress import Display
from fxprune.rewrite.compact.closed import check_calls
from fxprune.rewrite.compact.computed import computed_weights, give_back_computed
from fxprune.rewrite.compact.constant_branches import remove_constant_branches
from fxprune.rewrite.compact.constant_operands import cut_constants
from fxprune.rewrite.compact.constants import Dense, Recorded, fold, read_node, record
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.giving_back import give_back_before, give_back_node, give_back_users
from fxprune.rewrite.compact.kept import Slices
from fxprune.rewrite.compact.leaves import (
    HeldByLeaf,
    StaysModule,
    StaysWhole,
    first_held,
    open_leaf,
    why_held,
)
from fxprune.rewrite.compact.literals import Rewriter
from fxprune.rewrite.compact.modes import check_training, of_both_modes
from fxprune.rewrite.compact.modules import (
    own_parameters,
    share_parameters,
    slice_parameters,
    slices_of,
)
from fxprune.rewrite.compact.norm_sums import removed_sums
from fxprune.rewrite.compact.parameter_views import parameters_of_constant
from fxprune.rewrite.compact.parts import node_of, parts_of
from fxprune.rewrite.compact.products import keep_what_counts, operand_nodes
from fxprune.rewrite.compact.recipe import record_recipe
from fxprune.rewrite.compact.strides import multiples
from fxprune.rewrite.compact.table import tabulate
from fxprune.rewrite.compact.trial import (
    RUN_ERRORS,
    NodeFailure,
    OutputsDiffer,
    in_double,
    outputs_of,
    set_shapes,
    two_runs,
    verified,
)
from fxprune.rewrite.compact.written import written_parameters
from fxprune.rewrite.masking.copying import cast_numbers, duplicate
from fxprune.rewrite.masking.finalize import baked, shapes_of
from fxprune.rewrite.masking.parameters import read
from fxprune.sparsity.masks import Masks, is_empty

__all__ = ["compact"]

ATTEMPTS = 64
"""How often channels are given back before a node that cannot be rewritten is an error."""


def compact(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    exact: bool = True,
    verify: bool = True,
    fold_constants: bool = True,
    progress: bool = True,
    **others: NoReturn,
) -> fx.GraphModule:
    """Return a smaller network with the same outputs: channels that no path uses are gone.

    Args:
        model: a masked model, a finalized one, or any module with zeros in its weights; it is not changed.
        example_inputs: as in :func:`fxprune.apply`; not needed for what ``apply`` or ``capture`` returned.
        exact: let layer norms that lose channels compute what they computed with them. False gives plain
            norms over what is left, as retraining wants it; outputs then differ.
        verify: compare outputs in evaluation mode, and raise if they differ.
        fold_constants: move constants of removed channels into the biases of the layers that read them.
        progress: say on stderr what goes on, once it takes over a second.

    Constants are those of evaluation: in training, a batch norm gives others for a channel without weights.

    Returns:
        A ``GraphModule`` of plain modules with fewer channels. ``meta["fxprune"]["compaction"]`` is a table
        by layer; what could not be removed stands there with the reason.

    Raises:
        TypeError: ``model`` is no module, or there is no such argument.
        ValueError: no path leads from the inputs to the outputs any more, or the network takes only certain
            whole numbers, and ``example_inputs`` is not given.
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
    refuse_unknown(compact, others)
    check_flags(exact=exact, verify=verify, fold_constants=fold_constants)
    check_module(model)
    warn_of_strange_parameters(model, "outputs that are no numbers are not compared", stacklevel=2)
    step = Display(enabled=progress).step("compact")
    with step, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return _compact(model, example_inputs, exact, verify, fold_constants)


def _compact(
    model: nn.Module, example_inputs: Any, exact: bool, verify: bool, fold_constants: bool
) -> fx.GraphModule:
    plain = baked(model)
    modes = {name: module.training for name, module in plain.named_modules()}
    has_shapes = isinstance(plain, fx.GraphModule) and all("val" in node.meta for node in plain.graph.nodes)
    gm = plain if isinstance(plain, fx.GraphModule) and has_shapes else capture(plain, example_inputs)
    known = read(model)
    if calls_whole(gm, plain):
        known, modes = renamed(known), {"": model.training, **renamed(modes)}
    written = written_parameters(gm)
    gm = (duplicate(gm) if written else gm).eval()  # trials change what they run
    runs = two_runs(gm, example_inputs)
    source, whole, closed, opened = gm, dict[str, str](), set[str](), list[str]()
    while True:
        graph = lower(source)
        masks = _masks(graph, source, known)
        cut = _first_cut(graph, source, masks, masked=bool(known))
        _keep_written(cut, written)
        way = _Way(graph, masks, cut, whole, closed, exact, fold_constants)
        try:
            small, slices, found = _proved(gm, source, way, runs, verify=verify)
            break
        except HeldByLeaf as held:
            for path in held.paths:
                wider = share_parameters(source)
                try:
                    open_leaf(wider, path)
                except StaysWhole as error:
                    whole[path] = str(error)
                    closed |= {path} if isinstance(error, StaysModule) else set()
                    continue
                set_shapes(wider, runs[0])  # the next one may read what this one gives
                source = wider
                opened.append(path)
    own_parameters(small, source)
    small.meta = {**gm.meta}
    notes = dict(small.meta.get("fxprune", {}))
    parameters = {name: list(shape) for name, shape in shapes_of(model).items()}
    recipe = record_recipe(
        gm, source, small, slices, opened=opened, masked=list(known), parameters=parameters
    )
    recipes = [*notes.get("recipes", ()), recipe]
    table = tabulate(graph, cut, gm, small, found, slices)
    small.meta["fxprune"] = {**notes, "compaction": table, "recipes": recipes}
    for name, module in small.named_modules():
        module.train(modes.get(name, modes[""]))
    return small


@dataclass(frozen=True, eq=False)
class _Way:
    """Hold the cut of a graph and the options.

    ``masks``: by weight, what counts or may grow; ``whole``: by path of a layer that cannot be opened,
    the reason; ``closed``: those among them that may hold smaller layers.
    """

    graph: ChannelGraph
    masks: Masks
    cut: Cut
    whole: Mapping[str, str]
    closed: Collection[str]
    exact: bool
    fold_constants: bool


Runs = tuple[tuple[Any, ...], tuple[Any, ...]]


def _proved(
    gm: fx.GraphModule, source: fx.GraphModule, way: _Way, runs: Runs, *, verify: bool
) -> tuple[fx.GraphModule, Slices, float | None]:
    """The smaller network and the largest difference of its outputs; what makes others is given back."""
    nodes = {node.name: node for node in source.graph.nodes}
    try:
        before = _recorded(source, way, runs)
    except RUN_ERRORS as error:
        if source is not gm:
            raise
        given = ", ".join(str(tuple(x.shape)) for x in runs[0] if isinstance(x, Tensor))
        raise InputError(
            f"example_inputs: the network does not run on {given or 'them'}: {first_line(error)}; pass inputs"
            " that it takes, or none where it was captured"
        ) from error
    expected = before.outputs
    if verify and source is not gm:
        expected = outputs_of(gm, runs[0]), outputs_of(gm, runs[1], 1)
    while True:
        small, slices, first = _smallest(source, way, runs, before.recorded)
        if not (verify and way.exact):
            return small, slices, None

        def in_float64() -> fx.GraphModule:
            wide = cast_numbers(copy.deepcopy(source), torch.float64)
            both = in_double(runs[0]), in_double(runs[1])
            return _smallest(wide, way, both, _recorded(wide, way, both).recorded)[0]

        outputs = (expected[0], first), (expected[1], outputs_of(small, runs[1], 1))
        try:
            return small, slices, verified(gm, small, runs, outputs, in_float64)
        except OutputsDiffer as error:
            start = nodes.get(error.node)
            reason = f"{error.node}: it would compute something else"
            if start is None or not give_back_before(way.graph, way.cut, start, reason):
                raise


def _masks(graph: ChannelGraph, gm: fx.GraphModule, known: Masks) -> Masks:
    """Return the masks of weights: those of the model (``known``), or where it has none, what is not zero."""
    valueless = next((name for name in graph.kernels if gm.get_parameter(name).is_meta), None)
    if valueless is not None:
        raise ValueError(
            f"model: {valueless!r} has no values (it is on the meta device); load the weights first"
        )
    if known:  # zeros that no mask holds may grow
        return {name: mask for name, mask in known.items() if name in graph.kernels}
    computed = computed_weights(graph, gm)
    return {
        name: (gm.get_parameter(name).detach() != 0).cpu() for name in graph.kernels if name not in computed
    }


def _first_cut(graph: ChannelGraph, gm: fx.GraphModule, masks: Masks, *, masked: bool) -> Cut:
    """Return what could go by the masks alone; ``masked``: they are the model's own."""
    computed = computed_weights(graph, gm)

    def nonzero(name: str) -> Tensor:
        weight = gm.get_parameter(name).detach()
        return (torch.ones_like(weight, dtype=torch.bool) if name in computed else weight != 0).cpu()

    used = used_channels(of_both_modes(graph), masks, resolution="channel")
    if graph.kernels and not any(bool(rows.any()) for rows, _ in used.values()):
        empty = [name for name, mask in masks.items() if is_empty(mask)] or list(graph.kernels)
        raise ValueError(
            f"model: no path leads from its inputs to its outputs; without weights on a path: "
            f"{', '.join(empty[:10])}; prune less, or with on_collapse='repair'"
        )
    followed = follow(graph)
    cut = Cut(graph, followed, used, nonzero, multiples(graph, gm, followed))
    # Without masks, all of a weight that is computed otherwise counts: what goes is not read.
    give_back_computed(graph, gm, cut, computed if masked else ())
    return cut


def _keep_written(cut: Cut, written: Collection[str]) -> None:
    """Give back the channels of weights that the network writes into, in the shape that they have."""
    for sides in cut.labels.sides:
        if sides.name in written:
            labels = torch.cat([sides.rows, sides.columns])
            cut.give_back(labels, f"{sides.name}: the network writes into it")


def _recorded(gm: fx.GraphModule, way: _Way, runs: Runs) -> Dense:
    """Run the network before, and keep what may be asked of it."""
    nodes = {node.name: node for node in gm.graph.nodes}
    return record(gm, runs, _sources(way.graph, nodes, way.cut))


def _smallest(
    gm: fx.GraphModule, way: _Way, runs: Runs, recorded: Recorded
) -> tuple[fx.GraphModule, Slices, Any]:
    """Rewrite a copy, and run it; where a node does not run, give its channels back and try again.

    The copy shares with ``gm`` the parameters that stay as they are. `HeldByLeaf` asks for a leaf to be
    opened.
    """
    graph, cut = way.graph, way.cut
    nodes = {node.name: node for node in gm.graph.nodes}
    uncut = set[str]()
    for _ in range(ATTEMPTS):
        try:
            # Before sums: norms in a closed layer would keep what they read.
            first_held(gm, slices_of(graph, gm, cut, uncut), way.whole, way.closed)
            sums, biases = _constants(gm, way, nodes, recorded)
            slices = slices_of(graph, gm, cut, uncut)
            odd = first_held(gm, slices, way.whole, way.closed)
            if odd is not None:
                give_back_users(graph, cut, odd, why_held(odd, way.whole))
                continue
            small = share_parameters(gm)
            Rewriter(graph, small, cut, sums, slices).run()
            cut_constants(graph, small, cut, slices)
            slice_parameters(small, slices, biases, _groups(graph, nodes, cut))
            outputs = set_shapes(small, runs[0])
            check_calls(gm, small, _narrowed(way.closed, slices), runs[0])
            check_training(gm, small, runs[0], numbers=way.exact)
            dead = _dead_weights(way.masks, slices) if way.fold_constants else set()
            if dead and remove_constant_branches(small, dead, runs):
                outputs = set_shapes(small, runs[0])
            return small, slices, outputs
        except UnevenCut as error:
            if not cut.give_back(error.labels, str(error)):
                raise RuntimeError(f"compact: {error}") from error
        except NodeFailure as error:
            written = parameters_of_constant(gm, error.node) - uncut
            uncut |= written  # what reads the constant picks entries of it instead
            if not written and not give_back_node(graph, cut, nodes, error):
                raise RuntimeError(f"compact: node {error}") from error
    raise RuntimeError(f"compact: no consistent cut in {ATTEMPTS} attempts; please report the network")


def _narrowed(closed: Collection[str], slices: Slices) -> set[str]:
    """Return the modules that stay whole and hold tensors that get smaller."""
    return {path for path in closed if any(name.startswith(f"{path}.") for name in slices)}


def _dead_weights(masks: Masks, slices: Slices) -> set[str]:
    """The weights of which nothing that is left counts, or may grow."""
    left = {name: slices[name].take(mask.cpu()) if name in slices else mask for name, mask in masks.items()}
    return {name for name, mask in left.items() if is_empty(mask)}


def _constants(
    gm: fx.GraphModule, way: _Way, nodes: dict[str, fx.Node], recorded: Recorded
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return what norms lose and what biases gain.

    What one reader gives back, another may have counted already: so all are asked until nothing changes.
    """
    graph, cut = way.graph, way.cut
    while True:
        before = cut.gone.clone()
        sums = removed_sums(graph, nodes, cut, recorded) if way.exact else {}
        biases = fold(graph, gm, cut, recorded, fold_constants=way.fold_constants)
        keep_what_counts(graph, cut, recorded, nodes)
        if torch.equal(before, cut.gone):
            return sums, biases


def _sources(graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut) -> set[str]:
    """The nodes whose numbers are asked for: what layers and norms read of channels that may go."""
    wanted = operand_nodes(graph, cut, nodes)
    order = {node: place for place, node in enumerate(nodes.values())}
    for op in graph.ops:
        if isinstance(op, (ir.Kernel, ir.Norm)) and op.node in nodes and cut.touches(op.inputs[0]):
            source = read_node(graph, nodes[op.node], op.inputs[0])
            if isinstance(source, fx.Node):
                wanted.add(source.name)
            wanted |= {node_of(graph, part) for part in parts_of(graph, op.inputs[0])}
            if isinstance(op, ir.Norm) and kind_of(nodes[op.node]) == "":
                for axis in op.axes:
                    counted = counted_nodes(graph, op, axis, nodes, order)
                    wanted |= {node.name for node in counted if node is not None}
    return wanted


def _groups(graph: ChannelGraph, nodes: dict[str, fx.Node], cut: Cut) -> dict[str, int]:
    """The number of groups that are left of every grouped convolution, by the layer's path."""
    found = {}
    for sides in cut.labels.sides:
        op = graph.ops[sides.op]
        assert isinstance(op, ir.Kernel)
        if op.groups > 1 and nodes[op.node].op == "call_module":
            left = (~cut.is_gone(sides.rows)).view(op.groups, -1).any(1)
            inside = op.inner and sides.name is not None  # of a module that is called as a whole
            path = str(sides.name).rpartition(".")[0] if inside else str(nodes[op.node].target)
            found[path] = int(left.sum())
    return found
