"""Rewrite the arguments of nodes that say sizes: shapes, split sizes, bounds, scales."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxprune.capture.tracer.spelling import called, changes_input
from fxprune.graph import ChannelGraph, ir
from fxprune.lowering.norm_statistics import GROUP_NORMS, LAYER_NORMS, RMS_NORMS
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.index_places import list_places, new_places
from fxprune.rewrite.compact.kept import Slices
from fxprune.rewrite.compact.means import scale_means
from fxprune.rewrite.compact.norm_nodes import NormNodes
from fxprune.rewrite.compact.parameter_views import KeptByNode, kept_of_parameters
from fxprune.rewrite.compact.picked import FILLS, PICKS, move_places
from fxprune.rewrite.compact.size_arguments import (
    counts_of,
    given_arguments,
    is_shape,
    number_of,
    set_shape,
)
from fxprune.rewrite.compact.spread import LIKE, REPEATS, set_counts, set_sizes

__all__ = ["Rewriter"]

_SHAPED = {"reshape", "view", "expand", "broadcast_to"}
_NORMS = LAYER_NORMS + RMS_NORMS + GROUP_NORMS
_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip
_COUNTS = {"numel", "nelement"}
_SPLITS = {"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"}


class Rewriter:
    """Rewrites the nodes of a copied graph, whose nodes have the names of the original's.

    ``removed_sums``: by the name of a norm's node, the sums of what it loses and of their squares.
    ``slices``: by parameter that gets smaller, what stays of it.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        gm: fx.GraphModule,
        cut: Cut,
        removed_sums: dict[str, tuple[Tensor, Tensor]],
        slices: Slices,
    ) -> None:
        self.graph, self.gm, self.cut = graph, gm, cut
        self.slices = slices
        self.constants: KeptByNode = {}
        self.norms = NormNodes(gm, cut, removed_sums)
        self.read = {value.index for op in graph.ops for value in op.inputs}
        self.kernels: dict[str, list[ir.Kernel]] = {}
        for op in graph.ops:
            if isinstance(op, ir.Kernel):
                self.kernels.setdefault(op.node, []).append(op)

    def run(self) -> None:
        """Rewrite every node."""
        self.constants = kept_of_parameters(self.gm, self.slices)
        for node in list(self.gm.graph.nodes):
            self._freeze_size(node)
        for node in list(self.gm.graph.nodes):
            self._rewrite(node)
            self._spread(node)
        scale_means(self.graph, self.gm, self.cut)
        self.gm.graph.lint()
        self.gm.recompile()

    def _value(self, x: Any) -> ir.Value | None:
        if not isinstance(x, fx.Node):
            return None
        found = self.graph.results.get(self.norms.instead_of.get(x.name, x.name))
        return found if isinstance(found, ir.Value) else None

    def _left_of_constant(self, x: Any) -> list[Tensor | None] | None:
        return self.constants.get(x) if isinstance(x, fx.Node) else None

    # -- sizes that are read off tensors ----------------------------------------------------------------
    def _freeze_size(self, node: fx.Node) -> None:
        """Replace the size of an axis that shrinks by the number it had: shapes get their own literals."""
        if called(node) in _COUNTS and node.args:
            self._freeze_count(node)
            return
        if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
            source, index = node.args[0], node.args[1]
        elif node.target is operator.getitem and is_shape(node.args[0]):
            assert isinstance(node.args[0], fx.Node)
            source, index = node.args[0].args[0], node.args[1]
        else:
            return
        value = self._value(source)
        if value is None or not isinstance(index, int) or not self.cut.shrinks(value, index):
            return
        number = value.shape[index]
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)

    def _freeze_count(self, node: fx.Node) -> None:
        """Let the number of all entries stay what it was, in proportion to the size of the batch."""
        source = node.args[0]
        value = self._value(source.args[0] if is_shape(source) else source)  # type: ignore[union-attr]
        if value is not None and self.cut.shrinks(value):
            users = list(node.users)
            with self.gm.graph.inserting_before(node.next):
                whole = self._in_proportion(node, math.prod(self.cut.shape(value)), math.prod(value.shape))
            for user in users:
                user.replace_input_with(node, whole)

    # -- nodes ------------------------------------------------------------------------------------------
    def _rewrite(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self.norms.module(node, self._value(node.args[0]) if node.args else None)
            return
        if node.op not in ("call_function", "call_method") or not node.args:
            return
        name = called(node)
        value, source = self._value(node), self._value(node.args[0])
        if name in _SHAPED and self.cut.shrinks(value):
            assert value is not None
            self._sizes(node, value)
        elif name in _SHAPED and node in self.constants:
            set_shape(node, self.constants[node])
        elif name == "unflatten" and self.cut.shrinks(value):
            self._unflatten(node, source, value)
        elif name in _SPLITS:
            self._split(node, source) if self.cut.shrinks(source) else self._split_parameter(node)
        elif name in ("narrow", "select") and self.cut.shrinks(source):
            self._bounds(node, source, name)
        elif name in PICKS or name in FILLS:
            move_places(self.gm, self.cut, node, source if name in PICKS else value, name)
        elif node.target in (operator.getitem, operator.setitem):
            self._index(node, source)
        elif node.target is F.scaled_dot_product_attention and self.cut.shrinks(source, -1):
            assert source is not None
            if node.kwargs.get("scale") is None and len(node.args) < 7:
                node.kwargs = {**node.kwargs, "scale": source.shape[-1] ** -0.5}
        elif source is not None and node.target in _NORMS:
            self.norms.called(node, source)
        elif name == "pad" and self.cut.shrinks(value):
            self._pad(node, source, value)
        elif node.target in _CONVOLUTIONS:
            self._convolution(node)

    def _spread(self, node: fx.Node) -> None:
        """Set how often a node repeats entries, or its sizes, if it goes by those of another tensor.

        Conditions, which no op reads, go on following the other tensor.
        """
        name, value = called(node), self._value(node)
        if value is None or node.op not in ("call_function", "call_method"):
            return
        if name in REPEATS and self.cut.shrinks(value):
            set_counts(node, value, self._value(node.args[0]), self.cut)
        other = self._value(node.args[1]) if name in LIKE else None
        if other is not None and value.index in self.read:
            set_sizes(node, value, other, self.cut)

    def _sizes(self, node: fx.Node, value: ir.Value) -> None:
        """Set the sizes of the axes that shrink; all others stay as they are."""
        packed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
        sizes: list[Any] = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        if any(is_shape(size) for size in sizes) or "size" in node.kwargs or "shape" in node.kwargs:
            raise UnevenCut(f"{node.name}: a shape taken whole", self.cut.labels_of(value))
        new = self.cut.shape(value)
        free = not any(size == -1 for size in sizes if isinstance(size, int))
        for axis, size in enumerate(sizes):
            if new[axis] == value.shape[axis] or (isinstance(size, int) and size == -1):
                continue
            if isinstance(size, fx.Node) and free and node.target not in ("expand", "broadcast_to"):
                sizes[axis], free = -1, False
            else:
                sizes[axis] = self._resized(node, size, value.shape[axis], new[axis])
        node.args = (node.args[0], tuple(sizes)) if packed else (node.args[0], *sizes)

    def _resized(self, node: fx.Node, size: Any, old: int, new: int) -> Any:
        """Return the size of an axis that had ``old`` entries and has ``new``.

        A number that the network computes, such as samples times groups, shrinks in that proportion, and goes
        on following the size of the batch.
        """
        if old == new or not isinstance(size, fx.Node):
            return size if old == new else new
        with self.gm.graph.inserting_before(node):
            return self._in_proportion(size, old, new)

    def _in_proportion(self, number: fx.Node, old: int, new: int) -> fx.Node:
        """Add the nodes that make of ``old`` entries ``new`` ones, and of multiples of it such multiples."""
        common, graph = math.gcd(old, new), self.gm.graph
        more = graph.call_function(operator.mul, (number, new // common))
        left = graph.call_function(operator.floordiv, (more, old // common))
        more.meta["val"], left.meta["val"] = old * new // common, new
        return left

    def _split(self, node: fx.Node, source: ir.Value | None) -> None:
        assert source is not None
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if not isinstance(dim, int) or not self.cut.shrinks(source, dim):
            return
        parts = self.graph.results.get(node.name)
        if not isinstance(parts, (list, tuple)) or any(part is None for part in parts):
            parts = self._parts(node, source, dim)
        sizes = [self.cut.shape(part)[dim] if isinstance(part, ir.Value) else part for part in parts]
        target: Any = torch.split
        node.target = "split" if node.op == "call_method" else target
        node.args, node.kwargs = (node.args[0], sizes), {"dim": dim}

    def _split_parameter(self, node: fx.Node) -> None:
        """Set the sizes of the parts of a parameter that is cut along the axis where it gets smaller."""
        source, known = node.args[0], self._left_of_constant(node.args[0])
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if known is None or not isinstance(dim, int) or (kept := known[dim]) is None:
            return
        target: Any = torch.split
        node.target = "split" if node.op == "call_method" else target
        node.args, node.kwargs = (source, counts_of(kept, node, dim)), {"dim": dim}

    def _parts(self, node: fx.Node, source: ir.Value, dim: int) -> list[int]:
        """Count the indices that stay in each part, where not every part has a value."""
        kept = self.cut.kept_along(source, dim % len(source.shape))
        kept = torch.ones(source.shape[dim], dtype=torch.bool) if kept is None else kept
        return counts_of(kept, node, dim)

    def _bounds(self, node: fx.Node, source: ir.Value | None, name: str) -> None:
        assert source is not None
        given = given_arguments(node, "dim", "index" if name == "select" else "start", "length")
        dim, start = given["dim"], number_of(given["index" if name == "select" else "start"])
        if not isinstance(dim, int) or not isinstance(start, int):
            return
        kept = self.cut.kept_along(source, dim % len(source.shape))
        if kept is None:
            return
        start = start % len(kept)
        first = int(kept[:start].sum())
        if name == "select":
            node.args, node.kwargs = (node.args[0], dim, first), {}
        else:
            length = int(kept[start : start + int(number_of(given["length"]))].sum())
            node.args, node.kwargs = (node.args[0], dim, first, length), {}

    def _unflatten(self, node: fx.Node, source: ir.Value | None, value: ir.Value | None) -> None:
        assert value is not None
        given = given_arguments(node, "dim", "sizes")
        dim = int(given["dim"]) % len(source.shape) if source is not None else 0
        sizes = [
            self._resized(node, size, value.shape[axis], self.cut.shape(value)[axis])
            for axis, size in enumerate(given["sizes"], start=dim)
        ]
        node.args, node.kwargs = (node.args[0], dim, tuple(sizes)), {}

    def _index(self, node: fx.Node, source: ir.Value | None) -> None:
        """Move the bounds of an index into a value that is read, or into a constant that gets smaller."""
        kept = self._left_of_constant(node.args[0])
        # What is written into has other channels than before, which the graph notes at the node that writes.
        whole = source if node.target is operator.getitem else self._value(node) or source
        if node.target is not operator.getitem and self._is_whole(node):
            whole = source
        if whole is not None and self.cut.shrinks(whole):
            kept = [self.cut.kept_along(whole, axis) for axis in range(len(whole.shape))]
        if kept is None:
            self._places(node)
            return
        given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if whole is not None and _is_written(node) and not all(_is_view(item) for item in given):
            raise UnevenCut(f"{node.name}: some channels are written in place", self.cut.labels_of(whole))
        used = sum(1 for item in given if item is not None and item is not Ellipsis)
        axis, new = 0, list[Any]()
        for item in given:
            if item is None:
                new.append(item)
                continue
            if item is Ellipsis:
                new.append(item)
                axis = len(kept) - (used - axis)
                continue
            new.append(self._index_along(node, kept[axis], item))
            axis += 1
        index: Any = tuple(new) if isinstance(node.args[1], tuple) else new[0]
        node.args = (node.args[0], index, *node.args[2:])

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a node writes into a constant that keeps its size, until something reads it."""
        made = self._value(node)
        while made is not None:
            maker = self.graph.op_of(made)
            if maker is None or isinstance(maker, ir.Source):
                own = maker is not None and not made.live and not maker.params
                return own and not self.cut.touches(made) and not self._is_sized_like(maker)
            writer = next((each for each in node.graph.nodes if each.name == maker.node), None)
            if writer is None or writer.target is not operator.setitem or not maker.inputs:
                return False
            made = maker.inputs[0]
        return False

    def _is_sized_like(self, source: ir.AnyOp | None) -> bool:
        """Whether a constant has the sizes of a value that gets smaller."""
        for node in self.gm.graph.nodes:
            if source is not None and node.name == source.node and node.args:
                return called(node).endswith("_like") and self.cut.shrinks(self._value(node.args[0]))
        return False

    def _places(self, node: fx.Node) -> None:
        """List the places where what is left of a parameter is written, in a constant that stays as long."""
        known = self._left_of_constant(node.args[2]) if node.target is operator.setitem else None
        items = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
        made: Any = node.args[0]
        is_cut = self.cut.shrinks(self._value(made))  # its places are other ones then
        if known is None or is_cut or not all(isinstance(item, slice) for item in items):
            return
        list_places(node, items, known)

    def _index_along(self, node: fx.Node, kept: Tensor | None, item: Any) -> Any:
        if kept is None or item == slice(None):
            return item
        bounded = isinstance(item, slice)
        item = (
            slice(*(number_of(x) for x in (item.start, item.stop, item.step))) if bounded else number_of(item)
        )
        if isinstance(item, int):
            place = int(kept[: item % len(kept)].sum())
            if kept[item] or not (node.target is operator.setitem or _is_written(node)):
                return place
            return slice(place, place)  # nothing is written
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(len(kept))
            return slice(int(kept[:start].sum()), int(kept[:stop].sum()))
        if isinstance(item, slice):
            places = list(range(*item.indices(len(kept))))
            return [int(kept[:place].sum()) for place in places if kept[place]]
        if (picked := new_places(self.gm, item, kept)) is not None:
            return picked
        source = self._value(node.args[0])
        labels = torch.zeros(0, dtype=torch.int64) if source is None else self.cut.labels_of(source)
        raise UnevenCut(f"{node.name}: an index along channels", labels)

    def _pad(self, node: fx.Node, source: ir.Value | None, value: ir.Value | None) -> None:
        """Set the number of channels that are filled in, or cropped, before and behind others."""
        assert value is not None
        given = given_arguments(node, "pad", "mode", "value")
        sizes = list(given["pad"])
        for place in range(0, len(sizes), 2):
            axis = len(value.shape) - 1 - place // 2
            for end, size in enumerate(sizes[place : place + 2]):
                holder = value if isinstance(size, int) and size > 0 else source
                kept = self.cut.kept_along(holder, axis) if holder is not None else None
                if isinstance(size, int) and size != 0 and kept is not None:
                    part = kept[: abs(size)] if end == 0 else kept[-abs(size) :]
                    sizes[place + end] = int(part.sum()) * (1 if size > 0 else -1)
        node.args, node.kwargs = (node.args[0],), {**given, "pad": sizes}

    def _convolution(self, node: fx.Node) -> None:
        """Set the number of groups that are left of a convolution that is called as a function."""
        for op in self.kernels.get(node.name, ()):
            if op.groups == 1:
                continue
            sides = self.cut.sides_of(op)
            left = int((~self.cut.is_gone(sides.rows)).view(op.groups, -1).any(1).sum())
            if "groups" in node.kwargs:
                node.kwargs = {**node.kwargs, "groups": left}
            else:
                node.args = (*node.args[:6], left, *node.args[7:])


def _is_written(node: fx.Node) -> bool:
    """Whether what a node picks is changed in place."""
    return any(changes_input(user) and user.args[:1] == (node,) for user in node.users)


def _is_view(item: Any) -> bool:
    """Whether an index of one axis picks one entry or a run of them: it stays a view with fewer."""
    return item is None or item is Ellipsis or not isinstance(item, slice) or item.step in (None, 1)
