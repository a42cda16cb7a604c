"""Find the matrix weights of a network: what one expects to be pruned when a share of the weights goes."""

from __future__ import annotations

import copy

from torch import fx, nn

from fxprune.capture.tracer.isolation import restore_rng, rng_state
from fxprune.capture.tracer.spelling import called
from fxprune.graph import ir
from fxprune.lowering.eager import graph_of_run
from fxprune.lowering.parameters import Parameters
from fxprune.torch_private import ConvNd, NormBase

__all__ = ["hidden_layers", "matrices_outside"]

FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What code raises that runs on numbers which mean nothing."""
TABLES = (nn.Embedding, nn.EmbeddingBag)
MOVES = frozenset(
    """
    contiguous expand flatten float getattr getitem index_select interpolate mul narrow permute reshape
    squeeze t to transpose type type_as unsqueeze view
    """.split()
)
PRODUCTS = frozenset("baddbmm bmm einsum linear matmul mm tensordot".split())
LAYERS = (nn.Linear, nn.Bilinear, ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def matrices_outside(gm: fx.GraphModule, graph: ir.ChannelGraph) -> dict[str, int]:
    """Name the matrix weights that are no kernels of the graph, with their sizes, largest first.

    A matrix weight is a parameter of two or more axes that are longer than one, which the network multiplies
    with its data in a contraction, as it is or scaled by sample, or of which it is not known what becomes of
    it; or which it overwrites in each call, or computes such numbers from; or that a part which stays whole
    does not read in evaluation (the size of the noise on a weight). Tables that are looked up or added
    (embeddings, position tables), scales and shifts, and parameters of norms are none.

    Args:
        gm: the captured network.
        graph: what :func:`lower` made of it.

    >>> from fxprune.capture import capture
    >>> from fxprune.lowering import lower
    >>> import torch
    >>> gm = capture(nn.Linear(4, 3), torch.ones(1, 4))
    >>> matrices_outside(gm, lower(gm))
    {}
    """
    parameters = Parameters.of(gm)
    sizes = {
        name: tensor.numel()
        for name, tensor in parameters.tensors.items()
        if sum(size > 1 for size in tensor.shape) > 1
        and name not in graph.kernels
        and not isinstance(parameters.owners[name][1], (*TABLES, *NORMS))
    }
    met = _met(graph).union(graph.overwritten, *graph.overwritten.values()) if sizes else set()
    met |= _unread(gm, graph, parameters) if sizes else set()
    met -= _frozen_factors(graph, parameters) if met else set()
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: -sizes[name]) if name in met}


def hidden_layers(gm: fx.GraphModule, graph: ir.ChannelGraph) -> dict[str, tuple[str, ...]]:
    """Name the weights of layers inside of what no rule knows, with their other names.

    No path through them is known, but a layer multiplies its input with its weight wherever it stands, and so
    does a contraction with what is computed from a parameter: weights that are scaled by sample, tables of
    relative positions of which every query picks rows.
    """
    parameters = Parameters.of(gm)
    # What ops read may be buffers.
    read = {use.name for op in graph.opaque for use in op.params} & parameters.tensors.keys()
    layers = {name for name in read if _is_of_layer(name, parameters.owners[name][1])}
    scaled = _scaled(graph)
    met = {
        name
        for name in _met(graph, products=True)
        if name in parameters.tensors
        and not isinstance(parameters.owners[name][1], (*TABLES, *NORMS))
        and sum(size > 1 for size in parameters.tensors[name].shape) > 1
    }
    multiplied = {name for name in met if name in scaled or _is_moved_alone(gm, name)}
    layers |= _multiplied_inside(gm, graph, parameters, met - multiplied)
    return {
        name: tuple(parameters.aliases[name])
        for name in parameters.tensors
        if name in layers | multiplied and name in parameters.prunable and name not in graph.kernels
        if name not in graph.overwritten
        if parameters.tensors[name].numel()
    }


def _is_of_layer(name: str, owner: nn.Module) -> bool:
    """Whether ``owner`` is a layer that multiplies with the parameter itself.

    From others a hook computes the weight (torch's older weight norm).
    """
    made = {str(getattr(hook, "name", "")) for hook in owner._forward_pre_hooks.values()}
    parts = {weight + end for weight in made for end in ("_g", "_v", "_orig")}
    return isinstance(owner, LAYERS) and name.rpartition(".")[2] not in parts


def _multiplied_inside(
    gm: fx.GraphModule, graph: ir.ChannelGraph, parameters: Parameters, others: set[str]
) -> set[str]:
    """Parameters of modules that stay whole, which a run on made-up numbers multiplies with.

    These are modules that no rule knows and that have weights other than those of PyTorch's layers, and
    those in which some of ``others`` are. What cannot be run has none.
    """
    unknown = {op.node for op in graph.opaque}
    found: set[str] = set()
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        own = any(
            parameter.dim() > 1
            for part in module.modules()
            if not isinstance(part, (*LAYERS, *TABLES, *NORMS))
            for parameter in part.parameters(recurse=False)
        )
        asked = {name for name in others if name.startswith(f"{node.target}.")}
        if not (own and node.name in unknown) and not asked:
            continue
        args, kwargs = (fx.node.map_arg(x, lambda n: n.meta["val"]) for x in (node.args, node.kwargs))
        before = rng_state()
        try:
            inside = graph_of_run(copy.deepcopy(module), args, kwargs, "")
        except FAILURES:
            continue
        finally:
            restore_rng(before)
        tensors = dict(module.named_parameters())
        met = (parameters.names.get(id(tensors[name])) for name in inside.kernels)
        found |= {name for name in met if name is not None and (name in asked or node.name in unknown)}
    return found


def _scaled(graph: ir.ChannelGraph) -> set[str]:
    """Weights that are scaled by values, along axes of their own."""
    return {
        use.name
        for op in graph.ops
        if isinstance(op, ir.Affine) and op.output.live and not op.bias and _brings_axes(op)
        for use in op.params
    }


def _is_moved_alone(gm: fx.GraphModule, name: str) -> bool:
    """Whether nothing becomes of a parameter on its way to products but what leaves its zeros zero."""
    pending = [node for node in gm.graph.nodes if node.op == "get_attr" and node.target == name]
    known = bool(pending)
    while pending:
        for user in pending.pop().users:
            if called(user) in MOVES:
                pending.append(user)
            elif called(user) not in PRODUCTS:
                return False
    return known


def _unread(gm: fx.GraphModule, graph: ir.ChannelGraph, parameters: Parameters) -> set[str]:
    """Parameters of users' modules that stay whole which nothing reads in evaluation."""
    read = {use.name for op in graph.ops for use in op.params}
    called_whole = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    own = {
        parameters.names[id(parameter)]
        for module in called_whole
        if not type(module).__module__.startswith(("torch.", "fxprune."))
        for parameter in module.parameters()
        if id(parameter) in parameters.names
    }
    return own - read


def _frozen_factors(graph: ir.ChannelGraph, parameters: Parameters) -> set[str]:
    """Parameters that are not trained, and that weights of their own shape are multiplied with: masks."""
    found: set[str] = set()
    for op in graph.ops:
        weight = parameters.tensors.get(op.weight.name or "") if isinstance(op, ir.Kernel) else None
        if weight is not None and weight.requires_grad:
            others = {use.name: parameters.tensors.get(use.name) for use in op.params}
            found |= {
                name
                for name, x in others.items()
                if x is not None and x.shape == weight.shape and not x.requires_grad
            }
    return found


def _met(graph: ir.ChannelGraph, *, products: bool = False) -> set[str]:
    """Parameters that a contraction meets, also by way of what is computed from them, or an unknown op.

    ``products``: only those that are an operand of a product of values.
    """
    carried: dict[int, frozenset[str]] = {}
    solved: dict[int, frozenset[str]] = {}  # all entries of a matrix reach each of the result
    met: set[str] = set()
    for op in graph.ops:
        own = frozenset(use.name for use in op.params)
        inside = frozenset().union(*(carried.get(value.index, frozenset()) for value in op.inputs))
        match op:
            case ir.Mix():
                met |= own | inside
            case ir.Opaque():
                met |= set() if products else own | inside
            case ir.Kernel():
                met |= set() if products else own
            case _ if not op.output.live:
                carried[op.output.index] = own | inside
                taken = frozenset().union(*(solved.get(value.index, frozenset()) for value in op.inputs))
                whole = inside if isinstance(op, ir.Map) and len(op.axes) > 1 else frozenset()
                solved[op.output.index] = taken | whole
            case ir.Sum() if not products:
                for value in op.inputs:
                    met |= solved.get(value.index, frozenset())
            case ir.Affine() if not op.bias and _brings_axes(op):
                carried[op.output.index] = own | inside
            case ir.Affine() | ir.Map() | ir.Norm() | ir.Gather():
                carried[op.output.index] = inside
    return met


def _brings_axes(op: ir.Affine) -> bool:
    """Whether a value is spread along the axes of what scales it, as a style over the weights of a layer."""
    before, after = op.inputs[0].shape, op.output.shape
    return len(before) < len(after) or any(a < b for a, b in zip(before, after, strict=True))
