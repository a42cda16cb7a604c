"""Run DPaI's ascent on an accelerator, without waiting for the device inside a step.

The masks are those of :class:`fxprune.methods.dpai.adam_topk.Ascent`. On a CPU it pays to look for the scores
that can enter or leave the top-k; on a GPU it does not. Here every step makes the same operations on the same
memory, with the top-k searched anew, and is captured once as a CUDA graph and then replayed. Only circuits
with parts that autograd differentiates are run part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxprune.methods.dpai.adam_topk import BETAS, EPSILON
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Figures, UnitGroup
from fxprune.sparsity.masks import Masks

__all__ = ["DeviceAscent", "top_k_mask"]


class DeviceAscent:
    """Increase an objective by Adam on scores, with masks that meet the budget after every step.

    ``magnitudes``: |s| of every weight, by layer, in the parameter's shape, on the device of ``gradients``;
    ``-inf`` where a weight may not be kept. ``budget``: weights to keep in every layer. ``lr``: Adam's
    learning rate.
    """

    def __init__(
        self,
        gradients: KernelGradients,
        magnitudes: Mapping[str, Tensor],
        budget: Mapping[str, int],
        lr: float,
    ) -> None:
        self.gradients, self.lr, self.time = gradients, lr, 0
        self.shapes = {name: score.shape for name, score in magnitudes.items()}
        self.initial = {name: score.reshape(-1, gradients.widths[name]) for name, score in magnitudes.items()}
        units, size = {}, 0
        for name, scores in self.initial.items():
            units[name] = slice(size, size + len(scores))
            size += len(scores)
        device = gradients.device
        self.rise, self.mean, self.square = (torch.zeros(size, device=device) for _ in range(3))
        self.group = UnitGroup(torch.zeros(size, dtype=gradients.dtype, device=device), units)
        self._clock = torch.zeros((), dtype=torch.float64, device=device)
        self._captured_step = _CapturedCall(self._advance, device, is_enabled=gradients.circuit.is_fixed)
        self._has_no_path = True
        self._calibrations = -1
        gradients.attach([self.group])
        self.set_budget(budget)

    def set_budget(self, budget: Mapping[str, int]) -> None:
        """Keep another number of weights in every layer."""
        self.budget = dict(budget)
        self._captured_step.discard()
        self._update_counts()
        self._has_no_path = True

    def figures(self) -> Figures:
        """Return ln R_P, nodes and kernels of the present masks."""
        self._has_no_path = self.gradients.evaluate() == -math.inf
        if self._calibrations != self.gradients.circuit.calibrations:
            self._calibrations = self.gradients.circuit.calibrations
            self._captured_step.discard()  # scales are constants of the captured step
        return self.gradients.figures()

    def measured_step(self) -> Figures:
        """Make one step of Adam; return ln R_P, nodes and kernels before it."""
        figures = self.figures()
        self.step()
        return figures

    def step(self) -> None:
        """Make one step of Adam."""
        self.time += 1
        if self._has_no_path:  # gradients towards a first path depend on R, which has to be read
            self._has_no_path = self.gradients.evaluate() == -math.inf
            self._move()
        else:
            self._captured_step()

    def masks(self) -> Masks:
        """Return the present masks."""
        return {name: self._select(name).view(self.shapes[name]) for name in self.initial}

    # -- one step -------------------------------------------------------------------------------------------
    def _advance(self) -> None:
        self.gradients.evaluate_ahead()
        self._move()

    def _move(self) -> None:
        """Move the scores along the gradient (Kingma, Ba 2015, algorithm 1), and update the masks."""
        self._clock += 1
        first, second = 1 - BETAS[0] ** self._clock, (1 - BETAS[1] ** self._clock).sqrt()
        for block, units in enumerate(self.gradients.blocks(0)):
            gradient = self.gradients.gradient(0, block).nan_to_num_(0.0, 0.0, 0.0).clamp_(max=LARGEST)
            torch.threshold_(gradient, SMALLEST, 0.0)
            mean, square = self.mean[units], self.square[units]
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = square.sqrt().add_((EPSILON * second).float())
            self.rise[units].add_(mean / scale * (self.lr * second / first).float())
        self._update_counts()

    def _update_counts(self) -> None:
        for name, units in self.group.units.items():
            self.group.counts[units] = self._select(name).sum(1).to(self.group.counts.dtype)

    def _select(self, name: str) -> Tensor:
        """Return the mask of a layer (bool, units x weights of a unit)."""
        risen = self.initial[name] + self.rise[self.group.units[name]].unsqueeze(1)
        return top_k_mask(risen, self.budget[name])


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the k highest scores, ties by index, without waiting for the device.

    A variant of :func:`fxprune.sparsity.select.select`, which reads counts back from the device.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.topk(k, sorted=False).values.amin()
    is_above, is_tie = flat > threshold, flat == threshold
    tie_number = is_tie.cumsum(0, dtype=torch.int32)  # counts from 1
    mask = is_above | (is_tie & (tie_number <= k - is_above.sum()))
    return mask.view(scores.shape)


class _CapturedCall:
    """Call a function as a captured CUDA graph, if it ``is_enabled``; on other devices, call the function.

    A captured function makes the same operations on the same memory at every call, and waits for none of
    them.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, is_enabled: bool) -> None:
        self.function, self.device = function, device
        self.is_enabled = is_enabled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def discard(self) -> None:
        """Capture again at the next call, as a constant of the captured function has changed."""
        self._graph = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self.is_enabled:
            self._graph = self._capture()
        else:
            self.function()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Call the function once, on a stream of its own as capturing asks, and record it for later."""
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
