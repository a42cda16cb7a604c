"""Modules that stay one node, modules that are opened, and the warnings about them."""

import copy
import functools
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fxprune.capture import CaptureError, capture, capture_leaf


def called(gm: nn.Module) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.memory = nn.LSTM(4, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.conv = Own(8, 3, 1)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x = self.attention(x, x, x, need_weights=False)[0]
        x, (hidden, _) = self.memory(x)
        return self.conv(self.layer(x).transpose(1, 2)[..., None]).sum() + hidden.sum()


def test_modules_of_torch_and_subclasses_of_convolutions_stay_whole() -> None:
    model, index = Mixed().eval(), torch.zeros(2, 7, dtype=torch.long)
    gm = capture(model, index)
    assert called(gm) == ["embed", "attention", "memory", "layer", "conv"]
    for shape in ((1, 7), (3, 7), (2, 9)):
        index = torch.randint(0, 5, shape)
        assert torch.allclose(gm(index), model(index))
    hidden = next(n for n in gm.graph.nodes if n.target == "memory").meta["val"][1][0]
    assert hidden.shape == (4, 2, 4)


class LooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if y.sum() > 0 else -y


def test_an_untraceable_module_stays_whole_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(LooksAtData()))
    with pytest.warns(UserWarning, match=r"1\.0 \(LooksAtData\) kept whole: .*test_leaves.py:\d+") as caught:
        gm = capture(model, torch.empty(2, 3))
    assert len(caught) == 1
    assert called(gm) == ["0", "1.0"]
    for x in (torch.ones(3, 3), -torch.ones(1, 3)):
        assert torch.equal(gm(x), model(x))


class PerSample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[i] * (i + 1) for i in range(x.shape[0])])


def test_a_module_that_counts_the_batch_stays_whole_with_a_warning() -> None:
    model = nn.Sequential(PerSample(), nn.ReLU())
    with pytest.warns(
        UserWarning, match="0 .PerSample. kept whole: it makes a Python number of the batch size"
    ):
        gm = capture(model, torch.empty(2, 3))
    assert torch.equal(gm(torch.ones(5, 3)), model(torch.ones(5, 3)))
    with pytest.warns(UserWarning, match="the graph holds for the batch size of example_inputs"):
        capture(PerSample(), torch.empty(2, 3))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen["last"] = x
        return x * self.calls


def test_a_module_that_writes_itself_stays_whole_with_a_warning() -> None:
    model = nn.Sequential(Counts())
    with pytest.warns(UserWarning, match="kept whole: its forward writes its attribute 'calls'"):
        gm = capture(model, torch.empty(2, 3))
    assert model[0].calls == 0
    assert not model[0].seen
    assert [float(gm(torch.ones(1))) for _ in range(3)] == [1, 2, 3]
    with pytest.warns(
        UserWarning, match="Counts: its attribute 'calls' is written by the model; the graph does not"
    ):
        capture(Counts(), torch.empty(2, 3))


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_buffers_written_in_place_need_no_leaf() -> None:
    gm = capture(nn.Sequential(Running()), torch.empty(2))
    assert called(gm) == []
    assert [float(gm(torch.ones(1))) for _ in range(3)] == [1, 2, 3]


# -- hooks and parametrizations


def test_a_leaf_with_backward_hooks_cannot_be_opened() -> None:
    inner = nn.Sequential(nn.Linear(3, 3))
    inner.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert called(capture(nn.Sequential(inner), torch.empty(2, 3))) == ["0"]
    with pytest.raises(CaptureError, match="hooks"):
        capture_leaf(inner, (torch.empty(2, 3),), {})


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.T


def test_parametrized_modules_keep_their_parametrization() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    gm, x = capture(model, torch.empty(2, 3)), torch.randn(4, 3)
    assert torch.equal(gm(x), model(x))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert "T" in [
        node.args[1] for node in capture_leaf(model[0], (x,), {}).graph.nodes if len(node.args) == 2
    ]


def test_modules_pruned_by_torch_keep_their_masks() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    gm, x = capture(model, torch.empty(2, 3)), torch.randn(4, 3)
    assert torch.equal(gm(x), model(x))


# -- functions that PyTorch does not report


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 3, None


class UsesFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Tripled.apply(x, x.shape[1]) + 1


def test_custom_autograd_functions_keep_their_gradient() -> None:
    gm = capture(UsesFunction(), torch.empty(2, 3))
    for network in (gm, pickle.loads(pickle.dumps(copy.deepcopy(gm)))):
        x = torch.ones(5, 3, requires_grad=True)
        network(x).sum().backward()
        assert torch.equal(x.grad, torch.full((5, 3), 3.0))
    assert "apply" in gm.code


@torch.jit.script
def clipped(x: Tensor, limit: int) -> Tensor:
    if bool(x.sum() > limit):
        return x * 0 + limit
    return x


class UsesScript(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return clipped(x, x.shape[1]) + 1


def test_scripted_functions_are_nodes() -> None:
    gm = pickle.loads(pickle.dumps(capture(UsesScript(), torch.empty(2, 3))))
    assert gm(torch.full((1, 3), 0.5)).max() == 1.5
    assert gm(torch.full((1, 3), 7.0)).max() == 4


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(size).float()


class UsesCache(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + table(x.shape[1])


def test_caches_keep_nothing_of_the_trace() -> None:
    model, x = UsesCache(), torch.zeros(2, 3)
    assert torch.equal(capture(model, x)(x), model(x))
    assert not table(3).is_meta


# -- opening a leaf


def test_a_leaf_can_be_opened() -> None:
    model = timm.create_model("test_efficientnet")
    leaf = capture_leaf(model.bn1, (torch.empty(2, model.bn1.num_features, 8, 8, device="meta"),), {})
    assert torch.nn.functional.batch_norm in [node.target for node in leaf.graph.nodes]
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.empty(2, 5, 4, device="meta")
    opened = capture_leaf(attention, (x, x, x), {"need_weights": False})
    assert opened.graph.output_node().meta["val"][0].shape == (2, 5, 4)
    assert all("val" in node.meta for node in opened.graph.nodes)


def test_a_leaf_that_looks_at_its_data_cannot_be_opened() -> None:
    with pytest.raises(CaptureError, match=r"LooksAtData: bool\(\) asks for the numbers"):
        capture_leaf(LooksAtData(), (torch.empty(2, 3, device="meta"),), {})
