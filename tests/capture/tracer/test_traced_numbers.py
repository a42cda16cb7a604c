"""Code that looks at numbers in its own methods: those methods are nodes, the rest is traced."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from fxprune.capture import CaptureError, capture, capture_own
from fxprune.lowering import lower
from fxprune.paths.count import reach


class Selects(nn.Module):
    """Keeps the entries over a threshold: how many those are depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.threshold = nn.Linear(4, 8), 0.1

    def select(self, scores: Tensor, *, least: int = 0) -> dict[str, Tensor]:
        kept = torch.nonzero(scores.flatten() > self.threshold)[:, 0]
        return {"places": kept, "scores": scores.flatten()[kept] + least}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.select(torch.tanh(self.body(x)), least=1)
        return {"twice": 2 * found["scores"], "places": found["places"]}


class Loops(Selects):
    """Goes over what it selected one by one, in another method."""

    def each(self, scores: Tensor) -> Tensor:
        parts = [score * 2 for score in scores]
        return torch.stack(parts) if parts else scores.new_zeros(0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.select(torch.tanh(self.body(x)))
        return {"twice": self.each(found["scores"])}


class LoopsInForward(Selects):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.select(torch.tanh(self.body(x)))
        return {"twice": torch.stack([score * 2 for score in found["scores"]])}


@pytest.mark.parametrize("kind", [Selects, Loops])
@pytest.mark.filterwarnings("ignore:capture")
def test_methods_that_go_over_what_was_selected_are_nodes(kind: type[Selects]) -> None:
    torch.manual_seed(0)
    model = kind()
    gm = capture(model, torch.ones(2, 4))
    assert "body" in [str(node.target) for node in gm.graph.nodes]
    copies: list[Any] = [gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))]
    for scale in (0.1, 1.0, 3.0):
        x = scale * torch.randn(3, 4)
        want = model(x)
        for copied in copies:
            got = copied(x)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[key], want[key]) for key in want)
    graph = lower(gm)
    assert [op.reason for op in graph.opaque] == {Selects: [], Loops: ["no rule for Loops.each"]}[kind]
    assert list(graph.kernels) == ["body.weight"]


def test_a_method_that_is_a_node_is_named() -> None:
    with pytest.warns(UserWarning, match=r"Loops\.each kept whole: .*they decide its length"):
        capture(Loops(), torch.ones(2, 4))


def test_a_length_that_depends_on_numbers_is_not_taken_for_a_constant() -> None:
    with pytest.raises(CaptureError, match="they decide its length"):
        capture_own(LoopsInForward(), torch.ones(2, 4))


class SelectsNothing(Selects):
    """Made-up numbers, which are positive, are never under this threshold."""

    def select(self, scores: Tensor, *, least: int = 0) -> dict[str, Tensor]:
        kept = torch.nonzero(scores.flatten() < -1e9)[:, 0]
        return {"places": kept, "scores": scores.flatten()[kept] + least}


@pytest.mark.filterwarnings("ignore:capture")
def test_nothing_selected_still_lies_on_paths() -> None:
    graph = lower(capture(SelectsNothing(), torch.ones(2, 4)))
    assert bool(reach(graph, {})["body.weight"].all())


class Wrapped(nn.Module):
    """One function of images, named."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.function(y)
        return y.mean((2, 3)) + z.mean((2, 3))


READS = {
    "normalize": lambda x: F.normalize(x),
    "max_pool2d": lambda x: F.max_pool2d(x, 2, 2, 0, 1, True),
    "interpolate": lambda x: F.interpolate(x, None, 2, "bilinear", True),
    "layer_norm": lambda x: F.layer_norm(x, (4, 4)),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, 2, 0, True, True),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "relu": lambda x: F.relu(x, False),
}
WRITES = {
    "relu": lambda x: F.relu(x, True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, True),
    "elu": lambda x: F.elu(x, 2.0, inplace=True),
    "relu_": lambda x: F.relu_(x),
}


@pytest.mark.parametrize("name", [*READS, *(f"{name}, in place" for name in WRITES)])
def test_who_writes_into_its_input_and_who_does_not(name: str) -> None:
    torch.manual_seed(0)
    function = WRITES[name[: -len(", in place")]] if name.endswith("place") else READS[name]
    model = Wrapped(function).eval()
    gm = capture(model, torch.rand(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(gm(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
def test_a_detector_whole() -> None:
    torch.manual_seed(0)
    model = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None).eval()
    gm = capture(model, ([torch.ones(3, 96, 96), torch.ones(3, 96, 128)],))
    images = [torch.rand(3, 96, 96), torch.rand(3, 96, 128)]
    for got, want in zip(gm(images), model(images), strict=True):
        assert all(torch.equal(got[key], want[key]) for key in want)
    kernels = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name.removesuffix(".weight") for name in lower(gm).kernels} == kernels


class ByNumpy(nn.Module):
    """Takes a part of the batch that functions of NumPy count."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        if self.way == "floor":
            count = int(np.floor(size * 0.5))
        elif self.way == "ceil":
            count = np.ceil(size / 2).astype(int)
        elif self.way == "name of a type":
            count = np.ceil(size / 2).astype("int64")
        elif self.way == "type of NumPy":
            count = np.ceil(size / 2).astype(np.int64)
        elif self.way == "whole":
            count = int(np.floor(size)) - 1 if isinstance(np.floor(2), float) else np.floor(size) - 1
        elif self.way == "item":
            count = int(np.ceil(size / 2).item())
        elif self.way == "round":
            count = int(np.round(size * 0.4))
        elif self.way == "sqrt":
            count = int(np.ceil(np.sqrt(size)))
        else:
            count = int(np.floor_divide(size, 2) + np.multiply(np.float64(0.5), np.add(size, 1)))
        y: Tensor = self.layer(x)[:count]
        return y


@pytest.mark.parametrize(
    "way", ["floor", "ceil", "name of a type", "type of NumPy", "whole", "item", "round", "sqrt", "several"]
)
def test_functions_of_numpy_follow_the_batch(way: str) -> None:
    torch.manual_seed(0)
    model = ByNumpy(way)
    for size in (4, 5):
        gm = capture(model, torch.ones(size, 4))
        for batch in (1, 3, 4, 6, 9, 17):
            x = torch.randn(batch, 4)
            assert torch.equal(gm(x), model(x))


class PlansByNumpy(nn.Module):
    """Orders and weighs channels by arrays of NumPy, and changes what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        order = np.stack([np.arange(4)[::-1]])
        y = torch.as_tensor(self.first(x))[:, torch.tensor(order, device=x.device)[0]]
        weights = torch.as_tensor(np.linspace(0, 1, 4), dtype=x.dtype, device=x.device)
        weights += 1
        z: Tensor = self.last(y * weights)
        return z


@pytest.mark.filterwarnings("error:capture")
def test_arrays_of_numpy_are_numbers_of_the_code() -> None:
    torch.manual_seed(0)
    model, x = PlansByNumpy(), torch.randn(3, 4)
    gm = capture(model, x)
    for _ in range(2):  # what is written into is made anew
        assert torch.equal(gm(x), model(x))
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(gm.bfloat16()(x.bfloat16()), half(x.bfloat16()))
    graph = lower(gm)
    assert not graph.opaque
    assert list(graph.kernels) == ["first.weight", "last.weight"]
