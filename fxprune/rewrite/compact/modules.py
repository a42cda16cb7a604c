"""Slice parameters and buffers, and set the attributes of modules that say sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.torch_private import ConvNd, NormBase

__all__ = ["Slices", "is_sizeable", "slice_parameters", "slices_of"]

Slices = dict[str, Tensor]
"""By the name of a parameter or buffer: the flat places of the entries that stay, in the new shape."""


def slices_of(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut) -> Slices:
    """Return the entries that stay of every tensor that gets smaller."""
    tensors = dict(gm.named_parameters()) | dict(gm.named_buffers())
    values = {value.index: value for op in graph.ops for value in (*op.inputs, op.output)}
    masks: dict[str, list[Tensor]] = {}
    met: dict[str, list[Tensor]] = {}
    for op in graph.ops:
        for use in op.params:
            if use.name not in tensors:
                continue
            shape = tuple(tensors[use.name].shape)
            if isinstance(op, ir.Kernel) and use.name == op.weight.name and op.groups > 1:
                continue
            for axis, (along, size) in enumerate(zip(use.axes, shape, strict=True)):
                needed, seen = torch.ones(2, size, dtype=torch.bool)
                if along is not None:
                    needed, seen = cut.kept_by_use(values[along.value], along, size)
                for table, new in ((masks, needed), (met, seen)):
                    table.setdefault(use.name, [torch.zeros(n, dtype=torch.bool) for n in shape])[axis] |= new
    slices = {}
    for name, marks in masks.items():
        # What no use reads is nobody's to remove.
        kept = [needed | ~seen for needed, seen in zip(marks, met[name], strict=True)]
        if not all(bool(one.all()) for one in kept):
            places = torch.arange(tensors[name].numel()).view(tensors[name].shape)
            for axis, one in enumerate(kept):
                places = places.index_select(axis, one.nonzero().flatten())
            slices[name] = places
    slices.update(_grouped_slices(graph, tensors, cut))
    return slices


def _grouped_slices(graph: ChannelGraph, tensors: Mapping[str, Tensor], cut: Cut) -> Slices:
    """The entries that stay of grouped convolutions' weights: other input channels in every group."""
    found = {}
    for sides in cut.labels.sides:
        op = graph.ops[sides.op]
        assert isinstance(op, ir.Kernel)
        if op.groups == 1 or sides.name is None or sides.name not in tensors:
            continue
        rows = ~cut.is_gone(sides.rows).view(op.groups, -1)
        columns = ~cut.is_gone(sides.columns).view(op.groups, -1)
        if bool(rows.all()) and bool(columns.all()):
            continue
        weight = tensors[sides.name]
        transposed = op.window is not None and op.window.transposed
        shape = (
            (op.groups, columns.shape[1], rows.shape[1])
            if transposed
            else (op.groups, rows.shape[1], columns.shape[1])
        )
        if weight.numel() != torch.Size(shape).numel() * weight[0, 0].numel():
            raise UnevenCut("a view of a grouped weight", sides.columns)
        places = torch.arange(weight.numel()).view(*shape, *weight.shape[2:])
        parts = []
        for number in range(op.groups):
            row, column = rows[number].nonzero().flatten(), columns[number].nonzero().flatten()
            if len(row) == 0 and len(column) == 0:
                continue
            first, second = (column, row) if transposed else (row, column)
            parts.append(places[number].index_select(0, first).index_select(1, second))
        if len({part.shape for part in parts}) != 1:
            raise UnevenCut("groups of different sizes", torch.cat([sides.rows, sides.columns]))
        found[sides.name] = torch.cat(parts)
    return found


def slice_parameters(
    gm: fx.GraphModule, slices: Slices, biases: Mapping[str, Tensor], groups: Mapping[str, int]
) -> None:
    """Replace tensors by what stays of them, in place; add ``biases`` first, by the path of the layer."""
    with torch.no_grad():
        for path, extra in biases.items():
            module: Any = gm.get_submodule(path)
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(len(extra)), module.weight.requires_grad)
                if f"{path}.weight" in slices:
                    slices[f"{path}.bias"] = _rows_of(slices[f"{path}.weight"], module.weight)
            module.bias += extra.to(module.bias)
        homes = _homes(gm)
        for name, places in slices.items():
            path, _, leaf = name.rpartition(".")
            old = getattr(gm.get_submodule(path), leaf)
            new = old.detach().flatten()[places.to(old.device)].clone()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            for owner, attribute in homes[id(old)]:
                table = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
                table[attribute] = new
    for path, module in gm.named_modules():
        _set_sizes(module, groups.get(path))


def _homes(gm: fx.GraphModule) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of each parameter and buffer: the modules that hold it; tied ones have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in gm.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module, attribute))
    return found


def _rows_of(places: Tensor, weight: Tensor) -> Tensor:
    per_row = weight[0].numel()
    return torch.div(places.flatten(1)[:, 0], per_row, rounding_mode="floor")


_KNOWN = (
    nn.Linear, ConvNd, NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU, nn.Embedding,
)  # fmt: skip


def is_sizeable(gm: fx.GraphModule, name: str) -> bool:
    """Whether the owner of a tensor may hold a smaller one: its class is known, or it is not called."""
    path = name.rpartition(".")[0]
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    whole = any(path == target or path.startswith(f"{target}.") for target in called)
    return not whole or (path in called and isinstance(gm.get_submodule(path), _KNOWN))


def _set_sizes(module: nn.Module, groups: int | None) -> None:
    """Set the attributes that say sizes, of the classes that have them."""
    m: Any = module
    if isinstance(module, nn.Linear):
        m.out_features, m.in_features = module.weight.shape
    elif isinstance(module, ConvNd):
        if groups is not None:
            m.groups = groups
        first, second = module.weight.shape[:2]
        outputs, inputs = (second * m.groups, first) if m.transposed else (first, second * m.groups)
        m.out_channels, m.in_channels = outputs, inputs
    elif isinstance(module, NormBase):
        known = next((t for t in (m.weight, m.running_mean) if t is not None), None)
        if known is not None:
            m.num_features = len(known)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and m.weight is not None:
        m.normalized_shape = tuple(m.weight.shape)
    elif isinstance(module, nn.GroupNorm) and m.weight is not None:
        m.num_channels = len(m.weight)
    elif isinstance(module, nn.PReLU):
        m.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        m.embedding_dim = module.weight.shape[1]
