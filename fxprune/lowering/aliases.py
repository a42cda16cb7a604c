"""Memory that several names share: a write through one of them is seen by all.

In: the captured graph, and what its names stand for so far. Out: after a node that writes (``relu_``, ``+=``,
``x[i] = y``, ``out=``), what every name of that memory stands for now. Shapes and strides alone decide who
shares: the views are run again on a tensor without storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.module import OpenGraph
from fxprune.capture.runner import NodeRunner
from fxprune.capture.tracer.spelling import changes_input
from fxprune.graph import ir
from fxprune.graph.tensor_function import Operand, TensorFunction
from fxprune.lowering.builder import Builder
from fxprune.lowering.constant import Constant
from fxprune.lowering.reads import overwritten
from fxprune.lowering.rules.movement import MOVES, SHAPED_LIKE

__all__ = ["Memory", "written"]

# These give their input itself where it is already as asked for, or a copy.
AS_ASKED = {
    "as_tensor", "contiguous", "detach", "detach_", "to", "type", "type_as", "float", "double", "half",
    "bfloat16", "cpu", "cuda", "requires_grad_", nn.Identity,
}  # fmt: skip
# These change how a name sees its memory, and nothing in it.
RESHAPE_IN_PLACE = {
    "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "detach_", "requires_grad_"
}  # fmt: skip


def written(node: fx.Node, gm: OpenGraph) -> fx.Node | None:
    """The node whose memory this one writes to; ``None`` if it only reads."""
    if node.target in RESHAPE_IN_PLACE:
        return None
    if node.op == "call_module":
        writes = bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    else:
        writes = changes_input(node)
    if not writes:
        return None
    target = node.kwargs.get("out") or (node.args[0] if node.args else node.kwargs.get("input"))
    return target if isinstance(target, fx.Node) else None


class Memory:
    """Who shares memory with whom in one graph."""

    def __init__(self, gm: OpenGraph) -> None:
        self.gm = gm

    @cached_property
    def calls(self) -> NodeRunner:
        """Runs nodes; few graphs write."""
        return NodeRunner(self.gm, garbage_collect_values=False)

    def spread(self, node: fx.Node, env: dict[fx.Node, Any], build: Builder) -> None:
        """``node`` has written: update what the names of that memory stand for.

        Args:
            node: the node, already in ``env`` with what it gives.
            env: values and constants by node, changed in place.
            build: where the ops go.
        """
        first = written(node, self.gm)
        if first is None:
            return
        new = env[node]
        if isinstance(new, (ir.Value, Constant)) and not _is_shape_of(first, new):
            return  # ``out=`` of another shape
        family = self._family(first, node)
        place = family[first]
        for member, places in family.items():
            if member is first or any(user > node for user in member.users):
                env[member] = _rewritten(places, env[member], place, new, build)

    def names(self, writer: fx.Node) -> list[fx.Node]:
        """The nodes made before ``writer`` that may be names of the memory that it writes to."""
        root = written(writer, self.gm)
        while root is not None and (parent := self._parent(root)) is not None:
            root = parent
        found = [] if root is None else [root]
        for member in found:
            found += [user for user in member.users if user < writer and self._parent(user) is member]
        return found

    def views(self, writer: fx.Node) -> list[fx.Node]:
        """The node that ``writer`` writes to, what that is a view of, and so on up to the whole memory."""
        first = written(writer, self.gm)
        return [] if first is None else self._up_from(first)

    def _up_from(self, first: fx.Node) -> list[fx.Node]:
        found = [first]
        while (parent := self._parent(found[-1])) is not None:
            val = parent.meta["val"]
            if not _shares(self._run(found[-1], {parent: val}), val):
                break
            found.append(parent)
        return found

    def _family(self, first: fx.Node, writer: fx.Node) -> dict[fx.Node, Any]:
        """Names made before ``writer`` that share memory with ``first``, and where in it they are."""
        root = self._up_from(first)[-1]
        family: dict[fx.Node, Any] = {root: _blank(root.meta["val"])}
        pending = [root]
        while pending:
            member = pending.pop()
            for user in member.users:
                if user in family or not user < writer or self._parent(user) is not member:
                    continue
                places = self._run(user, family)
                if _shares(places, family[root]):
                    family[user] = places
                    pending.append(user)
        return family

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """The node that this one may be a view of."""
        if written(node, self.gm) is not None:
            return written(node, self.gm)
        as_asked = self._kind(node) in AS_ASKED
        if (self._kind(node) not in MOVES and not as_asked) or node.kwargs.get("copy"):
            return None
        operands = [*node.args, *node.kwargs.values()]
        if not operands or not isinstance(operands[0], fx.Node):
            return None
        return operands[0] if as_asked or not _has_tensors(operands[1:], node) else None

    def _kind(self, node: fx.Node) -> Any:
        module = node.op == "call_module"
        return type(self.gm.get_submodule(str(node.target))) if module else node.target

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """Run ``node`` in shapes and strides; a write gives what it wrote to."""
        target = written(node, self.gm)
        if target is not None:
            return known[target]

        def operand(n: fx.Node) -> Any:
            val = known.get(n, n.meta["val"])
            return val.detach() if isinstance(val, Tensor) else val

        parent = self._parent(node)
        if parent is not None and self._kind(node) in AS_ASKED:
            first, val = operand(parent), node.meta["val"]
            # There is no device here to move to: type and strides tell whether anything was asked for.
            return first if (first.dtype, first.stride()) == (val.dtype, val.stride()) else _blank(val)
        args, kwargs = fx.node.map_arg(node.args, operand), fx.node.map_arg(node.kwargs, operand)
        return getattr(self.calls, node.op)(node.target, args, kwargs)


def _has_tensors(operands: Sequence[Any], node: fx.Node) -> bool:
    """Whether the op is told by tensors what to move: then it copies."""
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(operands), found.append)
    return node.target not in SHAPED_LIKE and any(isinstance(n.meta["val"], Tensor) for n in found)


def _is_shape_of(first: fx.Node, new: ir.Value | Constant) -> bool:
    return isinstance(first.meta["val"], Tensor) and tuple(first.meta["val"].shape) == tuple(new.shape)


def _blank(val: Any) -> Any:
    """A tensor of these strides in memory of its own."""
    if isinstance(val, Tensor):
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    return val


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, (list, tuple)):
        return [tensor for item in x for tensor in _tensors(item)]
    return [x] if isinstance(x, Tensor) else []


def _shares(x: Any, root: Any) -> bool:
    memory = {tensor.untyped_storage()._cdata for tensor in _tensors(root)}
    return any(tensor.untyped_storage()._cdata in memory for tensor in _tensors(x))


def _rewritten(places: Any, old: Any, place: Tensor, new: Any, build: Builder) -> Any:
    """``old``, which lies at ``places`` in memory, after ``new`` was written at ``place``."""
    if isinstance(old, (list, tuple)):
        return type(old)(_rewritten(p, item, place, new, build) for p, item in zip(places, old, strict=True))
    if not isinstance(old, (ir.Value, Constant)) or not isinstance(places, Tensor):
        return old
    if not _shares(places, place):
        return old
    if places.dtype == place.dtype and _strides(places) == _strides(place):
        return new
    if places.dtype != place.dtype:  # memory read as another type
        return build.opaque(
            [build.materialise(old), build.materialise(new)], old.shape, "memory seen as another type"
        )
    if not _overlap(places, place):
        return old
    memory = _memory_of(places), _strides(places), _strides(place)
    if isinstance(old, Constant) and isinstance(new, Constant):
        return Constant(
            old.shape,
            old.dtype,
            lambda: write_memory(old.evaluate(), new.evaluate(), *memory),
            is_learnt=old.is_learnt or new.is_learnt,
            reads=overwritten(old.reads, new.reads, lambda a, b: write_memory(a, b, *memory), old.shape),
        )
    values = [build.materialise(old), build.materialise(new)]
    first, second = (Operand(i, isinstance(x, Constant) and x.zero) for i, x in enumerate((old, new)))
    return build.gather(TensorFunction.of(write_memory, first, second, *memory), values, old.shape)


def _strides(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    memory = torch.zeros(_memory_of(a), dtype=torch.bool)
    memory.as_strided(*_strides(b)).fill_(True)
    return bool(memory.as_strided(*_strides(a)).any())


Places = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and offset of a tensor in its memory."""


def write_memory(old: Tensor, new: Tensor, size: int, reads: Places, writes: Places) -> Tensor:
    """Write ``new`` at ``writes`` into a memory where ``old`` lies at ``reads``, and read ``old`` again."""
    memory = old.new_zeros(size)
    memory.as_strided(*reads).copy_(old)
    memory.as_strided(*writes).copy_(new)
    return memory.as_strided(*reads).clone()
