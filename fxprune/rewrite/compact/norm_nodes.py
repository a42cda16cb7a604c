"""Rewrite the norms of a graph that lose channels: with constants for what is gone, or over fewer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph import ir
from fxprune.lowering.norm_statistics import GROUP_NORMS, RMS_NORMS
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.norms import (
    NARROWED,
    NarrowedGroupNorm,
    NarrowedLayerNorm,
    NarrowedRMSNorm,
    narrower,
)

__all__ = ["NormNodes"]


class NormNodes:
    """The norms of a copied graph.

    ``removed_sums``: by the name of a norm's node, the sums of what it loses and of their squares.
    ``instead_of``: by the name of a node that is new, that of the norm whose place it took.
    """

    def __init__(self, gm: fx.GraphModule, cut: Cut, removed_sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.gm, self.cut, self.removed_sums = gm, cut, removed_sums
        self.instead_of: dict[str, str] = {}

    def called(self, node: fx.Node, source: ir.Value) -> None:
        """Rewrite a call of a norm's function, if it loses channels."""
        if node.target in GROUP_NORMS and self.cut.shrinks(source, 1):
            self._functional_group_norm(node, source)
        elif node.target not in GROUP_NORMS and self.cut.touches(source):
            self._functional_norm(node, source)

    def _functional_norm(self, node: fx.Node, source: ir.Value) -> None:
        names: tuple[str, ...] = ("normalized_shape", "weight", "bias", "eps")
        if node.target in RMS_NORMS:
            names = ("normalized_shape", "weight", "eps")
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        if node.name not in self.removed_sums:
            given["normalized_shape"] = self._shape_left(source, len(given["normalized_shape"]))
            node.args, node.kwargs = (node.args[0],), given
            return
        operands = [given.get(name) for name in names[1:-1]]
        if len(given["normalized_shape"]) > 1:
            self._narrow_whole(node, source, operands, given.get("eps"))
        else:
            self._narrow(node, source, operands, given.get("eps"), rms=node.target in RMS_NORMS)

    def module(self, node: fx.Node, source: ir.Value | None) -> None:
        """Rewrite a call of a module, if it is a norm that loses channels."""
        module: Any = self.gm.get_submodule(str(node.target))
        if isinstance(module, NARROWED) and source is not None:
            self._narrow_again(node, source, module)
        if isinstance(module, nn.GroupNorm) and self.cut.shrinks(source, 1):
            assert source is not None
            self._group_norm(node, source, module)
        if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or not self.cut.shrinks(source):
            return
        assert source is not None
        several = len(module.normalized_shape)
        if node.name not in self.removed_sums:
            module.normalized_shape = self._shape_left(source, several)
            return
        rms = isinstance(module, nn.RMSNorm)
        operands = self._operands(node, module, ("weight",) if rms else ("weight", "bias"))
        if several > 1:
            self._narrow_whole(node, source, operands, module.eps)
        else:
            self._narrow(node, source, operands, module.eps, rms=rms)

    def _shape_left(self, source: ir.Value, axes: int) -> tuple[int, ...]:
        return tuple(self.cut.shape(source)[-axes:])

    def _operands(self, node: fx.Node, module: nn.Module, leaves: Sequence[str]) -> list[Any]:
        """Read the parameters of a module that is not called any more."""
        with self.gm.graph.inserting_before(node):
            return [
                None
                if getattr(module, leaf, None) is None
                else self.gm.graph.get_attr(f"{node.target}.{leaf}")
                for leaf in leaves
            ]

    def _group_norm(self, node: fx.Node, source: ir.Value, module: nn.GroupNorm) -> None:
        groups = module.num_groups
        if node.name not in self.removed_sums:
            module.num_groups = self._groups_left(source, groups)
            return
        total, squares = self.removed_sums[node.name]
        norm = NarrowedGroupNorm(source.shape[1] // groups, module.eps, total, squares)
        self._call_instead(node, norm, self._operands(node, module, ("weight", "bias")))

    def _functional_group_norm(self, node: fx.Node, source: ir.Value) -> None:
        names = ("num_groups", "weight", "bias", "eps")
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        groups = int(given["num_groups"])
        if node.name not in self.removed_sums:
            given["num_groups"] = self._groups_left(source, groups)
            node.args, node.kwargs = (node.args[0],), given
            return
        total, squares = self.removed_sums[node.name]
        norm = NarrowedGroupNorm(source.shape[1] // groups, given.get("eps", 1e-5), total, squares)
        self._call_instead(node, norm, [given.get("weight"), given.get("bias")])

    def _narrow_again(self, node: fx.Node, source: ir.Value, module: Any) -> None:
        """Let a norm that lost channels before lose more; without sums it is over fewer channels."""
        grouped = isinstance(module, NarrowedGroupNorm)
        axis = 1 if grouped else -1
        kept = self.cut.kept_along(source, axis % len(source.shape))
        if kept is None:
            return
        by_group = kept.view(len(module.total) if grouped else 1, -1)
        left = by_group.any(1)
        zero = torch.zeros(1).to(module.squares)
        total, squares = self.removed_sums.get(node.name, (zero, zero))
        new: Any = narrower(module, total, squares, left if grouped else None)
        if node.name not in self.removed_sums:
            new.width -= by_group.shape[1] - int(kept.sum()) // int(left.sum())
        self._call_instead(node, new, node.args[1:])

    def _groups_left(self, source: ir.Value, groups: int) -> int:
        kept = self.cut.kept_along(source, 1)
        return groups if kept is None else int(kept.view(groups, -1).any(1).sum())

    def _narrow(
        self, node: fx.Node, source: ir.Value, operands: Sequence[Any], eps: Any, *, rms: bool
    ) -> None:
        """Let a norm that knows what is gone take the place of a node."""
        total, squares = self.removed_sums[node.name]
        width = source.shape[-1]
        if rms:
            self._call_instead(node, NarrowedRMSNorm(width, eps, squares), operands)
        else:
            norm = NarrowedLayerNorm(width, 1e-5 if eps is None else eps, total, squares)
            self._call_instead(node, norm, operands)

    def _narrow_whole(self, node: fx.Node, source: ir.Value, operands: Sequence[Any], eps: Any) -> None:
        """Let a group norm of one group take the place of a norm over channels and positions."""
        norm = NarrowedGroupNorm(source.shape[1], 1e-5 if eps is None else eps, *self.removed_sums[node.name])
        last = self._call_instead(node, norm, ())
        for function, operand in zip((operator.mul, operator.add), operands, strict=True):
            if operand is None:
                continue
            users = list(last.users)
            with self.gm.graph.inserting_after(last):
                step = self.gm.graph.call_function(function, (last, operand))
            for user in users:
                user.replace_input_with(last, step)
            step.meta = dict(last.meta)
            self.instead_of[step.name] = self.instead_of[last.name]
            last = step

    def _call_instead(self, node: fx.Node, module: nn.Module, operands: Sequence[Any]) -> fx.Node:
        """Let a new module take the place of a node, and return its node."""
        name = f"narrowed_{node.name}"
        self.gm.add_module(name, module)
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.call_module(name, (node.args[0], *operands))
        new.meta = dict(node.meta)
        self.instead_of[new.name] = node.name
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)
        return new
