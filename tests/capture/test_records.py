"""Results that are records: they keep their class, and what they hold may be there in one mode alone."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower


class Output(OrderedDict[str, Any]):
    """A dict that is also read by place, as the outputs of transformers are."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass
class Pair:
    first: Tensor
    state: Any = None


class State:
    def __init__(self, rows: Tensor) -> None:
        self.layers = [rows]


class Looking(nn.Module):
    """Looks at its data, and so stays whole; its result is a record."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        y = y if y.sum() > 0 else -y
        if self.kind is Pair:
            return Pair(y, None if self.training else State(y * 2))
        return self.kind(first=y, second=y + 1)


class Reading(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.last = Looking(kind), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        if isinstance(out, Pair):
            return Pair(self.last(out.first), out.state)
        return self.last(out[0]) + self.last(out["second"])


@pytest.mark.filterwarnings("ignore:capture")
def test_a_dict_of_its_own_class_is_read_by_place() -> None:
    torch.manual_seed(0)
    model = Reading(Output)
    gm = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), model(x))


@pytest.mark.filterwarnings("ignore:capture")
def test_a_state_that_training_does_not_have() -> None:
    torch.manual_seed(0)
    model = Reading(Pair)
    gm = capture(model, torch.randn(2, 4))
    x = torch.randn(2, 4)
    for training in (False, True):
        mine, other = gm.train(training)(x), model.train(training)(x)
        assert torch.equal(mine.first, other.first)
        assert (mine.state is None) == training
        if not training:
            assert torch.equal(mine.state.layers[0], other.state.layers[0])
    graph = lower(gm, strict=True)
    assert set(graph.kernels) == {"last.weight"}
    assert "inner" in {op.layer for op in graph.opaque}


def test_operators_of_libraries_and_numbers_of_numpy_are_written_down() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            boxes = x.new_tensor([[0, 1.0, 1.0, 6.0, 6.0]])
            return torchvision.ops.roi_align(self.layer(x) / np.sqrt(4.0), boxes, (4, 4))

    model, x = Pooled(), torch.randn(2, 3, 8, 8)
    gm = capture(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), model(x))
