"""Time one layer at a grid of widths: convolutions and linear maps, in PyTorch or in onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir

__all__ = ["Layer", "Widths", "layer_of", "time_layer", "time_whole"]

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""The widths that are timed, as shares of a layer's own."""

LEAST_RUNS, LEAST_SECONDS = 5, 0.004


@dataclass(frozen=True)
class Layer:
    """Tell layers apart whose times differ at equal widths.

    ``sizes``: of the input, without its channels: the batch and the positions. ``inputs``, ``outputs``: the
    channels of the whole layer; ``groups`` equal parts of them that do not meet.
    """

    sizes: tuple[int, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    bias: bool = False
    dtype: str = "float32"

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has one input channel, so that the width is one number."""
        return self.groups > 1 and self.groups == self.inputs

    def key(self) -> str:
        """Return all fields as text."""
        return " ".join(f"{name}={value}".replace(" ", "") for name, value in asdict(self).items())


@dataclass(frozen=True)
class Widths:
    """Hold the milliseconds of a layer, ``times[o][i]`` at ``outputs[o]`` and ``inputs[i]`` channels."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]

    def at(self, outputs: float, inputs: float) -> float:
        """Interpolate the time at some widths; below the smallest that was timed it is that one's.

        >>> Widths((4, 8), (2, 4), ((1.0, 2.0), (3.0, 4.0))).at(6, 3)
        2.5
        """
        o, weight_o = _place(self.outputs, outputs)
        i, weight_i = _place(self.inputs, inputs)
        low, high = (
            row[i] * (1 - weight_i) + row[min(i + 1, len(row) - 1)] * weight_i
            for row in (self.times[o], self.times[min(o + 1, len(self.times) - 1)])
        )
        return low * (1 - weight_o) + high * weight_o

    @property
    def whole(self) -> float:
        """The milliseconds of the whole layer."""
        return self.times[-1][-1]

    def least(self, other: Widths) -> Widths:
        """Return the smaller of two times at each width of one grid.

        >>> Widths((4, 8), (2,), ((1.0,), (9.0,))).least(Widths((4, 8), (2,), ((2.0,), (3.0,)))).times
        ((1.0,), (3.0,))
        """
        pairs = zip(self.times, other.times, strict=True)
        return Widths(self.outputs, self.inputs, tuple(tuple(map(min, one, two)) for one, two in pairs))

    def slopes(self, outputs: float, inputs: float) -> tuple[float, float]:
        """Return the milliseconds that one output channel less saves, and one input channel less."""
        below_o, below_i = _below(self.outputs, outputs), _below(self.inputs, inputs)
        now = self.at(outputs, inputs)
        return (
            (now - self.at(below_o, inputs)) / (outputs - below_o) if outputs > below_o else 0.0,
            (now - self.at(outputs, below_i)) / (inputs - below_i) if inputs > below_i else 0.0,
        )


def layer_of(op: ir.Kernel, rows: int, columns: int, dtype: torch.dtype) -> Layer:
    """Describe the layer that an op of a graph is, with ``rows`` output and ``columns`` input channels."""
    value = op.inputs[0]
    window = op.window
    name = str(dtype).removeprefix("torch.")
    if window is None:
        return Layer((prod(value.shape) // columns,), columns, rows, bias=op.bias, dtype=name)
    rank = len(window.kernel)
    sizes = (prod(value.shape[: -rank - 1]), *value.shape[-rank:])
    padding = tuple(max(pair) for pair in window.padding)
    return Layer(
        sizes, columns, rows, window.kernel, window.stride, padding, window.dilation, op.groups,
        window.transposed, op.bias, name,
    )  # fmt: skip


def time_layer(layer: Layer, device: torch.device, session: Callable[[Any, Tensor], Any] | None) -> Widths:
    """Time a layer at a grid of widths; times never fall where a width grows.

    ``session``: makes a function of an ONNX model and its input, for runtimes that take these.
    """
    outputs = _grid(layer.outputs, layer.groups)
    inputs = (layer.inputs,) if layer.is_depthwise else _grid(layer.inputs, layer.groups)
    times = torch.tensor(
        [[_milliseconds(_run(layer, o, i, device, session), device) for i in inputs] for o in outputs]
    )
    times = times.cummax(0).values.cummax(1).values
    return Widths(outputs, inputs, tuple(tuple(row) for row in times.tolist()))


def time_whole(layer: Layer, device: torch.device, session: Callable[[Any, Tensor], Any] | None) -> float:
    """Return the milliseconds of a layer at its own widths; ``session`` as for :func:`time_layer`."""
    return _milliseconds(_run(layer, layer.outputs, layer.inputs, device, session), device)


def _grid(whole: int, groups: int) -> tuple[int, ...]:
    """Widths that the groups divide, the whole one the last."""
    step = groups if groups < whole else 1
    return tuple(sorted({max(round(share * whole / step), 1) * step for share in SHARES} | {whole}))


def _run(
    layer: Layer,
    outputs: int,
    inputs: int,
    device: torch.device,
    session: Callable[[Any, Tensor], Any] | None,
) -> Callable[[], object]:
    """Return a function that runs the layer once at some widths."""
    groups = layer.groups
    if layer.is_depthwise:
        groups = inputs = max(outputs * layer.inputs // layer.outputs, 1)
        outputs = inputs * (layer.outputs // layer.inputs)
    dtype = getattr(torch, layer.dtype)
    if session is not None:
        x, model = _onnx_model(layer, outputs, inputs, groups)
        found: Callable[[], object] = session(model, x)
        return found
    bias = torch.randn(outputs, device=device, dtype=dtype) if layer.bias else None
    if not layer.kernel:
        x = torch.randn(layer.sizes[0], inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        return lambda: torch.nn.functional.linear(x, weight, bias)
    x = torch.randn(layer.sizes[0], inputs, *layer.sizes[1:], device=device, dtype=dtype)
    shape = (inputs, outputs // groups) if layer.transposed else (outputs, inputs // groups)
    weight = torch.randn(*shape, *layer.kernel, device=device, dtype=dtype)
    rank = len(layer.kernel)
    name = f"conv_transpose{rank}d" if layer.transposed else f"conv{rank}d"
    function = getattr(torch.nn.functional, name)
    options = {"groups": groups, "dilation": layer.dilation, "stride": layer.stride, "padding": layer.padding}
    return lambda: function(x, weight, bias, **options)


def _onnx_model(layer: Layer, outputs: int, inputs: int, groups: int) -> tuple[Tensor, Any]:
    """Build a model of one layer, and its input."""
    import onnx

    given = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    if layer.kernel:
        x = torch.randn(layer.sizes[0], inputs, *layer.sizes[1:])
        shape = (inputs, outputs // groups) if layer.transposed else (outputs, inputs // groups)
        weight = torch.randn(*shape, *layer.kernel)
        operation = "ConvTranspose" if layer.transposed else "Conv"
        options: dict[str, Any] = {
            "kernel_shape": layer.kernel, "strides": layer.stride, "dilations": layer.dilation,
            "pads": [*layer.padding, *layer.padding], "group": groups,
        }  # fmt: skip
    else:
        x, weight = torch.randn(layer.sizes[0], inputs), torch.randn(inputs, outputs)
        operation, options = "Gemm", {}
    names, tensors = ["x", "weight"], {"weight": weight}
    if layer.bias:
        names, tensors = [*names, "bias"], {**tensors, "bias": torch.randn(outputs)}
    node = onnx.helper.make_node(operation, names, ["y"], **options)
    weights = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = onnx.helper.make_graph(
        [node], "layer", [given("x", kind, list(x.shape))], [given("y", kind, None)], weights
    )
    opset = onnx.helper.make_opsetid("", 17)
    return x, onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The lower quartile of several runs: other work on the machine only adds."""
    found: list[float] = []
    run(), run()
    while len(found) < LEAST_RUNS or sum(found) < 1e3 * LEAST_SECONDS:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return sorted(found)[len(found) // 4]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(grid: Sequence[int], width: float) -> tuple[int, float]:
    """The last place of a grid at or below a width, and the share of the way to the next."""
    if width <= grid[0]:
        return 0, 0.0
    place = max(n for n, one in enumerate(grid) if one <= width)
    if place == len(grid) - 1:
        return place, 0.0
    return place, (width - grid[place]) / (grid[place + 1] - grid[place])


def _below(grid: Sequence[int], width: float) -> float:
    """The largest timed width below one, or that one where there is none."""
    return max((one for one in grid if one < width), default=width)
