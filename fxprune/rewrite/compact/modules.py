"""Slice parameters and buffers, and set the attributes of modules that say sizes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.kept import Kept, Slices
from fxprune.torch_private import ConvNd, NormBase

__all__ = [
    "holders",
    "own_parameters",
    "set_sizes",
    "share_parameters",
    "slice_parameters",
    "slices_of",
    "unsizeable",
]


def slices_of(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut, uncut: Collection[str] = ()) -> Slices:
    """Return the entries that stay of every tensor that gets smaller; those named in ``uncut`` do not."""
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
            slices[name] = Kept.by_marks(kept)
    slices.update(_grouped_slices(graph, tensors, cut))
    return {name: kept for name, kept in slices.items() if name not in uncut}


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
        found[sides.name] = Kept(tuple(weight.shape), flat=torch.cat(parts))
    return found


def slice_parameters(
    gm: fx.GraphModule, slices: Slices, biases: Mapping[str, Tensor], groups: Mapping[str, int]
) -> None:
    """Replace tensors by copies of what stays of them; add ``biases`` to it, by the path of the layer.

    ``slices`` gets those of biases that are new. All that are not sliced stay what they are.
    """
    with torch.no_grad():
        for path, extra in biases.items():
            module: Any = gm.get_submodule(path)
            weight, bias = f"{path}.weight", f"{path}.bias"
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(len(extra)), module.weight.requires_grad)
                if weight in slices:
                    slices[bias] = Kept((len(extra),), (slices[weight].first_indices(),))
        homes = holders(gm)
        for path, extra in biases.items():
            present = gm.get_parameter(f"{path}.bias")
            _replace(homes, present, present.detach() + extra.to(present))
        for name, kept in slices.items():
            path, _, leaf = name.rpartition(".")
            old = getattr(gm.get_submodule(path), leaf)
            _replace(homes, old, kept.take(old.detach()))
    for path, module in gm.named_modules():
        set_sizes(module, groups.get(path))


def share_parameters(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a network without its parameters, which both then have; `own_parameters` undoes that."""
    return copy.deepcopy(gm, {id(parameter): parameter for parameter in gm.parameters()})


def own_parameters(gm: fx.GraphModule, others: nn.Module) -> None:
    """Copy the parameters that ``gm`` still shares with ``others``."""
    shared = {id(parameter) for parameter in others.parameters()}
    homes = holders(gm)
    for parameter in list(gm.parameters()):
        if id(parameter) in shared:
            _replace(homes, parameter, parameter.detach().clone())


def _replace(homes: dict[int, list[tuple[nn.Module, str]]], old: Tensor, value: Tensor) -> None:
    """Put a tensor in the place of another, in all modules that hold it."""
    parameter = isinstance(old, nn.Parameter)
    new = nn.Parameter(value, requires_grad=old.requires_grad) if parameter else value
    places = homes[id(old)]
    for owner, attribute in places:
        if isinstance(owner, nn.RNNBase):
            setattr(owner, attribute, new)  # it keeps a list of its weights
        else:
            (owner._parameters if parameter else owner._buffers)[attribute] = new  # type: ignore[assignment]
    homes[id(new)] = places


def holders(gm: fx.GraphModule) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of each parameter and buffer: the modules that hold it; tied ones have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in gm.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module, attribute))
    return found


_KNOWN = (
    nn.Linear, nn.Bilinear, ConvNd, NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU, nn.Embedding,
    nn.EmbeddingBag, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell,
)  # fmt: skip


def unsizeable(gm: fx.GraphModule, names: Iterable[str], closed: Collection[str] = ()) -> list[str]:
    """Return the tensors whose owners may not hold smaller ones: they are called, of unknown classes.

    ``closed``: paths of called modules whose own code calls layers, which may hold smaller ones.
    """
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    found = []
    for name in names:
        path = name.rpartition(".")[0]
        parts = path.split(".")
        around = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        sizeable = path in called or not around.isdisjoint(closed)
        if not around.isdisjoint(called) and not (sizeable and isinstance(gm.get_submodule(path), _KNOWN)):
            found.append(name)
    return found


def set_sizes(module: nn.Module, groups: int | None) -> None:
    """Set the attributes that say sizes, of the classes that have them."""
    m: Any = module
    if isinstance(module, nn.Linear):
        m.out_features, m.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        m.out_features, m.in1_features, m.in2_features = module.weight.shape
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
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        m.embedding_dim = module.weight.shape[1]
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        _set_units(module)


def _set_units(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Set the widths of a recurrent layer by those of its weights."""
    m: Any = module
    end = "_l0" if isinstance(module, nn.RNNBase) else ""
    taken, fed = m._parameters[f"weight_ih{end}"], m._parameters[f"weight_hh{end}"]
    projected = m._parameters.get(f"weight_hr{end}")
    m.input_size, m.hidden_size = taken.shape[1], (fed if projected is None else projected).shape[1]
    if projected is not None:
        m.proj_size = fed.shape[1]
