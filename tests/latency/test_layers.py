"""Layers as they are timed: what tells them apart, and the grid of their widths."""

import pytest
import torch

from fxprune.latency import runtimes
from fxprune.latency.layers import Layer, layer_of, time_layer
from latency.networks import CPU, groups_of, net


@pytest.mark.parametrize(
    "layer",
    [
        Layer((2, 6, 6), 4, 8, (3, 3), (2, 2), (1, 1), (1, 1), bias=True),
        Layer((1, 6), 8, 16, (3,), (1,), (0,), (1,), groups=8),
        Layer((1, 6, 6), 8, 8, (2, 2), (2, 2), (0, 0), (1, 1), groups=2, transposed=True),
        Layer((5,), 8, 16, bias=True),
    ],
)
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_layers_are_timed_on_a_grid_that_never_falls(layer: Layer, runtime: str) -> None:
    session = None
    if runtime == "onnxruntime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        session = runtimes.onnx_session(1)
    found = time_layer(layer, CPU, session)
    assert (found.outputs[-1], found.inputs[-1]) == (layer.outputs, layer.inputs)
    assert all(width % layer.groups == 0 for width in found.outputs) or layer.is_depthwise
    times = torch.tensor(found.times)
    assert (times > 0).all()
    assert (times.diff(dim=0) >= 0).all()
    assert (times.diff(dim=1) >= 0).all()


def test_layers_of_a_graph_are_described() -> None:
    _, groups = groups_of(net())
    sides = groups.labels.sides
    layers = [
        layer_of(groups.graph.ops[side.op], len(side.rows), len(side.columns), torch.float32)  # type: ignore[arg-type]
        for side in sides
    ]
    assert layers[1] == Layer((2, 6, 6), 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8, bias=True)
    assert layers[3] == Layer((2,), 64, 5, bias=True)
