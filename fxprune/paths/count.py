"""Count the paths of a network, or test whether there are any, with derivatives.

R is the total weight of all input-output paths when every weight is replaced by a non-negative number. Every
objective of the library is R with other numbers at the edges: masks (paths), \\|w\\| (SynFlow), w²
(SynFlow-L2, PX). :func:`flow` gives ln R and its gradients, :func:`reach` the weights that lie on any path.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.program import Resolution, compile_graph
from fxprune.paths.scaled import Counted, Tested
from fxprune.paths.traversal import EdgeWeights, Traversal

__all__ = ["Flow", "check_weights", "flow", "log_paths", "reach", "run_tested"]


@dataclass(frozen=True)
class Flow:
    """Result of :func:`flow`. ``log_total``: ln R per sample (``-inf`` without any path).

    ``gradients``: d ln R / d weight by kernel name, in the parameter's shape; zero throughout without any
    path.
    """

    log_total: float
    gradients: dict[str, Tensor]


def flow(
    graph: ir.ChannelGraph,
    weights: Mapping[str, Tensor],
    *,
    resolution: Resolution = "spatial",
    pool: Literal["sum", "mean"] = "sum",
    products: Literal["each", "mean"] = "each",
    dtype: torch.dtype = torch.float32,
) -> Flow:
    """Total weight R of all input-output paths, as ln R, and its derivatives.

    The network is read on an all-ones input with these weights, without biases, norms and activations;
    maximum pooling keeps the maximum; products pass each factor where the other is not Zero (Pham et al.
    2025, appendix I).

    Args:
        graph: the lowered network.
        weights: non-negative numbers by kernel name, in the parameter's shape; a kernel that is missing
            counts as ones. All on one device, where the work is done.
        resolution: ``"spatial"`` counts positions, ``"channel"`` reads images as periodic.
        pool: average pooling adds (``"sum"``, path counting) or averages (``"mean"``, as the network does).
        products: a product of two factors on paths passes on the paths of ``"each"`` (path counting), or the
            geometric ``"mean"`` of both: then each factor has half of the flow, however few weights it has,
            and none can die while the other lives (values beside queries and keys, above all).
        dtype: of the computation. Relative error grows with depth: about 1e-6 in float32, 1e-14 in float64.

    Returns:
        A :class:`Flow`. Finite for any depth; derivatives beyond 1e36 in float32 (1e300 in float64; of
        weights that are zero now, perhaps beyond 1e25 and 1e200) are cut off there.

    Raises:
        ValueError: a name that the graph does not have, or a shape that is not the parameter's.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 4)))
        >>> round(flow(graph, {}).log_total, 4) == round(math.log(4 * 8 * 2), 4)
        True
    """
    check_weights(graph, weights)
    program = compile_graph(graph, resolution)
    leaves = {name: weight.detach().to(dtype).requires_grad_() for name, weight in weights.items()}
    device = next((weight.device for weight in leaves.values()), torch.device("cpu"))
    with torch.enable_grad():
        arithmetic = Counted(dtype, device, pool, shares=products == "mean")
        traversal = Traversal(program, arithmetic, EdgeWeights(graph, leaves, dtype, device))
        mantissa, power = traversal.total()
        if float(mantissa.detach()) <= 0:
            return Flow(-math.inf, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
        log_total = _log(mantissa, power, program.samples)
        return Flow(log_total, _gradients(mantissa.log(), leaves))


def log_paths(
    graph: ir.ChannelGraph, weights: Mapping[str, Tensor], *, resolution: Resolution = "spatial"
) -> float:
    """Return ln R of :func:`flow` in float64, minus infinity without any path; no derivatives are taken.

    Args:
        graph, weights, resolution: as of :func:`flow`.

    Raises:
        ValueError: a name that the graph does not have, or a shape that is not the parameter's.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 4)))
        >>> round(math.exp(log_paths(graph, {})))
        64
    """
    check_weights(graph, weights)
    program = compile_graph(graph, resolution)
    values = {name: weight.detach().double() for name, weight in weights.items()}
    device = next((weight.device for weight in values.values()), torch.device("cpu"))
    with torch.no_grad():
        edges = EdgeWeights(graph, values, torch.float64, device)
        mantissa, power = Traversal(program, Counted(torch.float64, device, "sum"), edges).total()
    return _log(mantissa, power, program.samples) if float(mantissa) > 0 else -math.inf


def _log(mantissa: Tensor, power: Tensor, samples: int) -> float:
    return float(mantissa.detach().double().log() + power * math.log(2)) - math.log(samples)


def reach(
    graph: ir.ChannelGraph, masks: Mapping[str, Tensor], *, resolution: Resolution = "spatial"
) -> dict[str, Tensor]:
    """Effective weights: those that are kept and lie on at least one input-output path.

    Exact: the traversal is done in zeros and ones, so that nothing cancels, underflows or overflows. Maximum
    pooling lets any entry through, since any may win.

    Args:
        graph: the lowered network.
        masks: bool (or 0/1) tensors by kernel name; a kernel that is missing counts as dense.
        resolution: ``"spatial"``, or ``"channel"``: a superset of it, equal on periodic images.

    Returns:
        A bool tensor for every kernel of the graph, in the parameter's shape.

    Raises:
        ValueError: a name that the graph does not have, or a shape that is not the parameter's.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 1)))
        >>> reach(graph, {"0.weight": torch.tensor([[True], [False]])})["1.weight"]
        tensor([[ True, False]])
    """
    _, total, leaves = run_tested(graph, masks, resolution)
    gradients = _gradients(total, leaves)
    return {name: (gradients[name] > 0.5) & (leaf.detach() > 0.5) for name, leaf in leaves.items()}


def run_tested(
    graph: ir.ChannelGraph, masks: Mapping[str, Tensor], resolution: Resolution, keep: Collection[int] = ()
) -> tuple[Traversal, Tensor, dict[str, Tensor]]:
    """Traverse a masked network in zeros and ones.

    Returns:
        The traversal, which has kept the values ``keep``; 1.0 if there is any path and else 0.0, which can be
        derived; and the masks as floats by kernel name, which it was made of.
    """
    check_weights(graph, masks)
    program = compile_graph(graph, resolution)
    device = next((mask.device for mask in masks.values()), torch.device("cpu"))
    leaves = {
        name: (masks[name] != 0).float() if name in masks else torch.ones(kernels.shape, device=device)
        for name, kernels in graph.kernels.items()
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.enable_grad():
        edges = EdgeWeights(graph, leaves, torch.float32, device, rescale=False)
        traversal = Traversal(program, Tested(device), edges, keep=keep)
        total, _ = traversal.total()
    return traversal, total, leaves


def check_weights(graph: ir.ChannelGraph, weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for a name that the graph lacks, or a shape that is not the parameter's."""
    for name, weight in weights.items():
        if name not in graph.kernels:
            raise ValueError(
                f"no kernel is named {name!r}; the graph has {', '.join(list(graph.kernels)[:4])}, ..."
            )
        shape = tuple(graph.kernels[name].shape)
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(weight.shape)} is not the parameter's {shape}")


def _gradients(result: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not result.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(result, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
