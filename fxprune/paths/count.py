"""The linear interpreter: paths through the graph, counted or tested, with their derivatives.

In: a :class:`ChannelGraph` and a non-negative number per weight. Out: ln R, the log of the number (or the
weight) of all input-output paths, and its gradients; or which weights lie on a path at all. Every objective
of the library is this traversal with other numbers at the edges: masks (paths), \\|w\\| (SynFlow), w²
(SynFlow-L2, PX).

Numbers of paths leave every floating-point range (10^65 in a ResNet-18), so a value is a mantissa tensor and
a power of two; operands are brought to one scale wherever paths meet. ln R does not depend on the scales, so
they are constants to the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import Counting
from fxprune.paths.program import Half, Program, Resolution, Step, compile_graph
from fxprune.paths.scaled import Counted, Scaled, Tested, moderated
from fxprune.paths.steps import total

__all__ = ["Flow", "flow", "reach"]


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
        counts as
            ones. All on one device, where the work is done.
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
    _check(graph, weights)
    program = compile_graph(graph, resolution)
    leaves = {name: weight.detach().to(dtype).requires_grad_() for name, weight in weights.items()}
    device = next((weight.device for weight in leaves.values()), torch.device("cpu"))
    with torch.enable_grad():
        algebra = Counted(dtype, device, pool, shares=products == "mean")
        run = _Run(program, algebra, _Operands(graph, leaves, dtype, device))
        mantissa, scale = run.total()
        if float(mantissa.detach()) <= 0:
            return Flow(-math.inf, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
        log_total = float(mantissa.detach().double().log() + scale * math.log(2)) - math.log(program.samples)
        return Flow(log_total, _gradients(mantissa.log(), leaves))


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
    _check(graph, masks)
    program = compile_graph(graph, resolution)
    device = next((mask.device for mask in masks.values()), torch.device("cpu"))
    leaves = {
        name: (masks[name] != 0).float() if name in masks else torch.ones(kernels.shape, device=device)
        for name, kernels in graph.kernels.items()
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.enable_grad():
        run = _Run(program, Tested(device), _Operands(graph, leaves, torch.float32, device, scaled=False))
        gradients = _gradients(run.total()[0], leaves)
    return {name: (gradients[name] > 0.5) & (leaf.detach() > 0.5) for name, leaf in leaves.items()}


def _check(graph: ir.ChannelGraph, weights: Mapping[str, Tensor]) -> None:
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


class _Operands:
    """Weights as the steps read them: at most one and a scale (counted), or as patterns (presence)."""

    def __init__(
        self,
        graph: ir.ChannelGraph,
        leaves: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        scaled: bool = True,
    ) -> None:
        self.graph, self.leaves, self.dtype, self.device, self.scaled = graph, leaves, dtype, device, scaled
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def number(self, ref: ir.WeightRef) -> Tensor:
        return ref.operand(lambda name: self._leaf(name)[0]).to(self.device, self.dtype)

    def scale(self, ref: ir.WeightRef) -> Tensor | float:
        return 0.0 if ref.name is None else self._leaf(ref.name)[1]

    def pattern(self, ref: ir.WeightRef) -> Tensor:
        return ref.operand(lambda name: (self._leaf(name)[0].detach() > 0).to(self.dtype)).to(self.device)

    def _leaf(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._known:
            leaf = self.leaves.get(name)
            if leaf is None:
                leaf = torch.ones(self.graph.kernels[name].shape, dtype=self.dtype, device=self.device)
            self._known[name] = moderated(leaf) if self.scaled else (leaf, leaf.new_zeros(()))
        return self._known[name]


@dataclass(frozen=True)
class _Paths:
    """The setting of a step on the track of paths."""

    counting: Counting
    operands: _Operands
    constant: float = 0.0

    def operand(self, weight: ir.WeightRef) -> Tensor:
        return self.operands.number(weight)


@dataclass(frozen=True)
class _Presence:
    """The setting of a step on the track of presence."""

    operands: _Operands
    counting: Counting = "any"
    constant: float = 1.0

    def operand(self, weight: ir.WeightRef) -> Tensor:
        return self.operands.pattern(weight)


class _Run:
    """One traversal."""

    def __init__(self, program: Program, algebra: Counted | Tested, operands: _Operands) -> None:
        self.program, self.algebra, self.operands = program, algebra, operands
        self.paths: dict[int, Scaled] = {}
        self.present: dict[int, Tensor] = {}
        self.settings = _Paths(algebra.counting, operands), _Presence(operands)

    def total(self) -> tuple[Tensor, Tensor]:
        """R over the whole batch: a number and its scale."""
        last = {value.index: i for i, step in enumerate(self.program.steps) for value in step.op.inputs}
        outputs = self.program.outputs
        kept = {index for index, _ in outputs}
        for i, step in enumerate(self.program.steps):
            if step.op.output.live:
                self.paths[step.output] = self._paths(step)
            if step.needs_presence:
                self.present[step.output] = self._presence(step)
            for value in step.op.inputs:  # let go of what nobody reads again
                if last[value.index] == i and value.index not in kept:
                    self.paths.pop(value.index, None)
                    self.present.pop(value.index, None)
        if not outputs:
            nothing = self.algebra.start(torch.zeros(()))
            return nothing.x, nothing.scale
        tensors, scale = self.algebra.align([self.paths[index] for index, _ in outputs])
        return total([layout for _, layout in outputs], tensors), scale

    def _paths(self, step: Step) -> Scaled:
        algebra = self.algebra
        if step.linear is None:
            if step.pattern is not None:
                return algebra.start(step.pattern)
            parts = [self._half(half) for half in step.halves]
            return parts[0] if len(parts) == 1 else algebra.join(*parts)
        live = [self.paths[value.index] for value in step.op.inputs if value.live]
        aligned, scale = algebra.align(live)
        pending = iter(aligned)
        tensors = [
            next(pending) if value.live else live[0].x.new_zeros(self.program.shapes[value.index])
            for value in step.op.inputs
        ]
        result = step.linear(self.settings[0], tensors)
        if isinstance(step.op, ir.Kernel):
            scale = scale + self.operands.scale(step.op.weight)
        return algebra.settle(result, scale)

    def _half(self, half: Half) -> Scaled:
        x, scale, _ = self.paths[half.live]
        other = self.present[half.other] if half.ones is None else x.new_ones(half.ones)
        return self.algebra.settle(half.product(x, other), scale)

    def _presence(self, step: Step) -> Tensor:
        dtype, device = self.algebra.dtype, self.algebra.device
        if step.pattern is not None:
            return step.pattern.to(device, dtype)
        inputs = [
            self.present[value.index]
            if value.index in self.present
            else torch.ones(self.program.shapes[value.index], dtype=dtype, device=device)
            for value in step.op.inputs
        ]
        with torch.no_grad():
            if step.linear is not None:
                result = step.linear(self.settings[1], inputs)
            elif step.product is not None:
                shapes = [
                    (1,) * x.dim() if v.index not in self.present else None
                    for v, x in zip(step.op.inputs, inputs, strict=True)
                ]
                a, b = (x if s is None else x.new_ones(s) for x, s in zip(inputs, shapes, strict=True))
                result = step.product(a, b)
            return (result > 0.5).to(dtype)
