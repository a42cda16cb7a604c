"""DPaI's ascent on an accelerator: every step has the same operations on the same memory, and waits for none.

A reading of the network and initial scores come in; masks that meet a budget at every step go out, as from
:class:`fxprune.methods.dpai.adam_topk.Ascent`. On a CPU it pays to look which scores can have changed
sides; on a GPU it does not: the whole step is captured once as a CUDA graph and then replayed, with the exact
top-k searched anew. Only circuits with parts that autograd differentiates are run part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxprune.methods.dpai.adam_topk import BETAS, EPSILON
from fxprune.methods.dpai.kernel_gradients import KernelReading
from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Field, Figures
from fxprune.sparsity.masks import Masks

__all__ = ["DeviceAscent"]


class DeviceAscent:
    """``magnitudes``: |s| of every weight, by layer, in the parameter's shape, on the device of ``reading``;
    -inf where it may not be kept. ``budget``: weights to keep in every layer. ``lr``: how far a score goes in
    a step, about.
    """

    def __init__(
        self, reading: KernelReading, magnitudes: Mapping[str, Tensor], budget: Mapping[str, int], lr: float
    ) -> None:
        self.reading, self.lr, self.time = reading, lr, 0
        self.shapes = {name: score.shape for name, score in magnitudes.items()}
        self.initial = {name: score.reshape(-1, reading.widths[name]) for name, score in magnitudes.items()}
        where, size = {}, 0
        for name, units in self.initial.items():
            where[name] = slice(size, size + len(units))
            size += len(units)
        device = reading.device
        self.rise, self.mean, self.square = (torch.zeros(size, device=device) for _ in range(3))
        self.field = Field(torch.zeros(size, dtype=reading.dtype, device=device), where)
        self._clock = torch.zeros((), dtype=torch.float64, device=device)
        self._replay = _Replay(self._advance, device, is_captured=reading.circuit.is_fixed)
        self._is_lost = True
        self._calibrations = -1
        reading.attach([self.field])
        self.resize(budget)

    def resize(self, budget: Mapping[str, int]) -> None:
        """Another number of weights in every layer."""
        self.budget = dict(budget)
        self._replay.forget()
        self._settle()
        self._is_lost = True

    def figures(self) -> Figures:
        """ln R_P, nodes and kernels of the present masks."""
        self._is_lost = self.reading.climb() == -math.inf
        if self._calibrations != self.reading.circuit.calibrations:
            self._calibrations = self.reading.circuit.calibrations
            self._replay.forget()  # scales are constants of the captured step
        return self.reading.figures()

    def measured_step(self) -> Figures:
        """One step of Adam; returns ln R_P, nodes and kernels before it."""
        figures = self.figures()
        self.step()
        return figures

    def step(self) -> None:
        """One step of Adam."""
        self.time += 1
        if self._is_lost:  # no path: which way leads to one takes a look at each step
            self._is_lost = self.reading.climb() == -math.inf
            self._move()
        else:
            self._replay()

    def masks(self) -> Masks:
        """The present masks."""
        return {name: self._chosen(name).view(self.shapes[name]) for name in self.initial}

    # -- one step -------------------------------------------------------------------------------------------
    def _advance(self) -> None:
        self.reading.climb_ahead()
        self._move()

    def _move(self) -> None:
        self._clock += 1
        first, second = 1 - BETAS[0] ** self._clock, (1 - BETAS[1] ** self._clock).sqrt()
        for block, part in enumerate(self.reading.blocks(0)):
            # Kingma, Ba 2015, algorithm 1.
            direction = self.reading.direction(0, block).nan_to_num_(0.0, 0.0, 0.0).clamp_(max=LARGEST)
            torch.threshold_(direction, SMALLEST, 0.0)
            mean, square = self.mean[part], self.square[part]
            mean.lerp_(direction, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(direction, direction, value=1 - BETAS[1])
            scale = square.sqrt().add_((EPSILON * second).float())
            self.rise[part].add_(mean / scale * (self.lr * second / first).float())
        self._settle()

    def _settle(self) -> None:
        for name, where in self.field.where.items():
            self.field.counts[where] = self._chosen(name).sum(1).to(self.field.counts.dtype)

    def _chosen(self, name: str) -> Tensor:
        """The best weights of a layer (bool, units x weights of a unit), ties by index."""
        number = self.budget[name]
        risen = self.initial[name] + self.rise[self.field.where[name]].unsqueeze(1)
        if number == 0:
            return torch.zeros_like(risen, dtype=torch.bool)
        flat = risen.flatten()
        threshold = flat.topk(number, sorted=False).values.amin()
        is_above, is_tie = flat > threshold, flat == threshold
        place = is_tie.cumsum(0, dtype=torch.int32)
        chosen = is_above | (is_tie & (place <= number - is_above.sum()))
        return chosen.view(risen.shape)


class _Replay:
    """A function as one captured CUDA graph, if it ``is_captured``; on other devices, the function itself.

    A captured function does the same operations on the same memory at every call, and waits for none of them.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, is_captured: bool) -> None:
        self.function, self.device = function, device
        self.is_captured = is_captured and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def forget(self) -> None:
        """Captures anew at the next call: something that was a constant has changed."""
        self._graph = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self.is_captured:
            self._graph = self._captured()
        else:
            self.function()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Calls the function once, on a stream of its own as capturing asks, and records it for later."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.function()
        return graph
