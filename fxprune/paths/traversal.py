"""One traversal of a compiled graph: from the inputs to R, the total over all paths.

Numbers of paths leave every floating-point range (10^65 in a ResNet-18), so a value is a tensor of mantissas
and a power of two (:class:`Scaled`), and terms are brought to one power wherever paths meet. ln R does not
depend on the powers, so they are constants to the derivative.

A value is followed in up to two ways: the *paths* that arrive at each entry, and its *presence*, whether the
entry is ever different from zero. A product passes the paths through one factor where the other is present.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import EvalContext
from fxprune.paths.program import Half, Program, Step
from fxprune.paths.scaled import Counted, Scaled, Tested, moderated
from fxprune.paths.steps import total

__all__ = ["EdgeWeights", "Traversal"]


class EdgeWeights:
    """The weights of a traversal, as the steps read them; parameters without any count as ones.

    ``leaves``: non-negative numbers by parameter, which may be added to while a traversal runs. ``rescale``:
    very large or small weights are read as mantissas and an exponent. ``make``: makes the weights of a
    parameter whenever a step reads them, instead; none of them is held here.
    """

    def __init__(
        self,
        graph: ir.ChannelGraph,
        leaves: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        rescale: bool = True,
        make: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.graph, self.leaves, self.dtype, self.device, self.rescale = graph, leaves, dtype, device, rescale
        self.make = make
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def mantissas(self, ref: ir.WeightRef) -> Tensor:
        """The operand of a contraction, without its exponent."""
        return ref.operand(lambda name: self._leaf(name)[0]).to(self.device, self.dtype)

    def exponent(self, ref: ir.WeightRef) -> Tensor | float:
        """The power of two that the operand's mantissas stand at."""
        return 0.0 if ref.name is None or self.make is not None else self._leaf(ref.name)[1]

    def presence(self, ref: ir.WeightRef) -> Tensor:
        """The operand of a contraction with 1 for every positive weight."""
        return ref.operand(lambda name: (self._leaf(name)[0].detach() > 0).to(self.dtype)).to(self.device)

    def _leaf(self, name: str) -> tuple[Tensor, Tensor]:
        if self.make is not None:
            made = self.make(name)
            return made, made.new_zeros(())
        if name not in self._read:
            leaf = self.leaves.get(name)
            if leaf is None:
                leaf = torch.ones(self.graph.kernels[name].shape, dtype=self.dtype, device=self.device)
            self._read[name] = moderated(leaf) if self.rescale else (leaf, leaf.new_zeros(()))
        return self._read[name]


class Traversal:
    """Runs a program once.

    ``before_kernel(op, x)`` is called before a contraction with a parameter reads its weights; ``x`` are the
    paths that arrive. ``after_kernel(op, y)`` gives what stands for the result ``y`` of such a contraction.
    ``keep``: values, by index, whose paths and presence can be asked for afterwards.
    """

    def __init__(
        self,
        program: Program,
        arithmetic: Counted | Tested,
        edges: EdgeWeights,
        before_kernel: Callable[[ir.Kernel, Scaled[Tensor]], None] | None = None,
        keep: Collection[int] = (),
        after_kernel: Callable[[ir.Kernel, Tensor], Tensor] | None = None,
    ) -> None:
        self.program, self.arithmetic, self.edges = program, arithmetic, edges
        self.before_kernel, self.keep, self.after_kernel = before_kernel, keep, after_kernel
        self._paths: dict[int, Scaled[Tensor]] = {}
        self._present: dict[int, Tensor] = {}
        self._path_context = EvalContext(edges.mantissas, arithmetic.pooling)
        self._presence_context = EvalContext(edges.presence, "any", constant=1.0)

    def total(self) -> tuple[Tensor, Tensor]:
        """R over the whole batch: a number and its power of two."""
        outputs = self.program.outputs
        last_reads = {value.index: i for i, step in enumerate(self.program.steps) for value in step.op.inputs}
        kept = {index for index, _ in outputs} | set(self.keep)
        for i, step in enumerate(self.program.steps):
            if step.op.output.live:
                self._paths[step.output] = self._follow_paths(step)
            if step.needs_presence:
                self._present[step.output] = self._follow_presence(step)
            for value in step.op.inputs:
                if last_reads[value.index] == i and value.index not in kept:
                    self._paths.pop(value.index, None)
                    self._present.pop(value.index, None)
        if not outputs:
            nothing = self.arithmetic.start(torch.zeros(()))
            return nothing.values, nothing.power
        tensors, power = self.arithmetic.align([self._paths[index] for index, _ in outputs])
        return total([layout for _, layout in outputs], tensors), power

    def paths_to(self, value: ir.Value) -> Tensor | None:
        """Return the paths to a value of ``keep``, without their power; ``None`` if it is dead."""
        return self._paths[value.index].values if value.index in self._paths else None

    def presence_of(self, value: ir.Value) -> Tensor:
        """Return the presence of a value of ``keep``."""
        return self._present_or_ones(value, self.program.shapes[value.index])

    def presence(self) -> dict[int, Tensor]:
        """Mark where each value is present (1) or not (0), for the values that some product asks about."""
        for step in self.program.steps:
            if step.needs_presence:
                self._present[step.output] = self._follow_presence(step)
        return self._present

    # -- paths ------------------------------------------------------------------------------------------
    def _follow_paths(self, step: Step) -> Scaled[Tensor]:
        if step.pattern is not None:
            return self.arithmetic.start(step.pattern)
        if step.linear is not None:
            return self._follow_linear(step)
        parts = [self._follow_factor(half) for half in step.halves]
        return parts[0] if len(parts) == 1 else self.arithmetic.join(*parts)

    def _follow_linear(self, step: Step) -> Scaled[Tensor]:
        """Paths behind an op that is linear in its inputs; inputs without paths are zeros."""
        op = step.op
        live = [self._paths[value.index] for value in op.inputs if value.live]
        if self.before_kernel is not None and isinstance(op, ir.Kernel) and op.weight.name is not None:
            self.before_kernel(op, live[0])
        aligned, power = self.arithmetic.align(live)
        pending = iter(aligned)
        tensors = [
            next(pending) if value.live else aligned[0].new_zeros(self.program.shapes[value.index])
            for value in op.inputs
        ]
        assert step.linear is not None, "only linear steps get here"
        result = step.linear(self._path_context, tensors)
        if isinstance(op, ir.Kernel):
            power = power + self.edges.exponent(op.weight)
            if self.after_kernel is not None and op.weight.name is not None:
                result = self.after_kernel(op, result)
        return self.arithmetic.normalise(result, power)

    def _follow_factor(self, half: Half) -> Scaled[Tensor]:
        """Paths through one factor of a product, where the other factor is present."""
        live = self._paths[half.live]
        other = self._present[half.other] if half.ones is None else live.values.new_ones(half.ones)
        return self.arithmetic.normalise(half.product(live.values, other), live.power)

    # -- presence ---------------------------------------------------------------------------------------
    def _follow_presence(self, step: Step) -> Tensor:
        dtype, device = self.arithmetic.dtype, self.arithmetic.device
        if step.pattern is not None:
            return step.pattern.to(device, dtype)
        with torch.no_grad():
            if step.linear is not None:
                inputs = [self._present_or_ones(v, self.program.shapes[v.index]) for v in step.op.inputs]
                result = step.linear(self._presence_context, inputs)
            else:
                assert step.product is not None, "a step that is not linear is a product"
                factors = [self._present_or_ones(v, (1,) * len(v.shape)) for v in step.op.inputs]
                result = step.product(*factors)
            return (result > 0.5).to(dtype)

    def _present_or_ones(self, value: ir.Value, shape: tuple[int, ...]) -> Tensor:
        """The presence of a value, or ones of ``shape`` where it is present everywhere."""
        if value.index in self._present:
            return self._present[value.index]
        return torch.ones(shape, dtype=self.arithmetic.dtype, device=self.arithmetic.device)
