"""The captured graph: sizes, devices, types, writes in place, regions, results."""

import collections
import dataclasses
import math
import operator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.capture import CaptureError, capture, capture_own


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes]


def assert_equal_at(model: nn.Module, gm: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        assert torch.equal(gm(x.clone()), model(x.clone()))


# -- sizes
class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        half = math.ceil(channels / 2)
        if channels % 2:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        for i in range(half):
            x = x + i
        tokens = x.reshape(batch, -1, height * width).expand(batch, *x.flatten(2).shape[1:])
        grid = torch.arange(height * width, device=x.device).view(1, -1)
        return torch.cat([tokens, tokens.new_zeros(batch, 1, height * width)], 1) + grid + len(x.shape)


def test_sizes_stay_free() -> None:
    model = Sizes()
    gm = capture(model, torch.empty(2, 3, 4, 5))
    assert_equal_at(model, gm, (2, 3, 4, 5), (1, 3, 4, 5), (7, 3, 4, 5), (3, 3, 6, 2))


class NegatedSizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        return x[: -(-n // 2)] * (10 - n) * (n**2) * (1 / n) * (7 // n) * (2**n) * round(n / 3) * abs(-n)


def test_arithmetic_on_the_batch_size_is_recorded() -> None:
    model = NegatedSizes()
    assert_equal_at(model, capture(model, torch.empty(4, 3)), (4, 3), (1, 3), (5, 3))


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        values, _ = a.max(dim=1)
        first, *rest = b.unbind(1)
        return values + first + sum(rest)


def test_unpacking() -> None:
    model = Chunks()
    assert_equal_at(model, capture(model, torch.empty(2, 6)), (2, 6), (5, 6))


def test_every_node_carries_its_value() -> None:
    gm = capture(Sizes(), torch.empty(2, 3, 4, 5))
    for node in gm.graph.nodes:
        val = node.meta["val"]
        if isinstance(val, Tensor):
            assert val.is_meta
        if node.target is operator.getitem and isinstance(val, int):
            assert type(val) is int


# -- devices and types
class Made(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], 1, dtype=x.dtype, device=x.device)
        steps = torch.linspace(0, 1, 3, device=x.device).to(x.dtype)
        stable = torch.softmax(x.to(torch.float32), -1).to(x.dtype)
        return stable + mask + steps


def test_types_follow_the_input_unless_they_are_written_down() -> None:
    gm = capture(Made(), torch.empty(2, 3))
    assert_equal_at(Made(), gm, (5, 3))
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    assert gm(x).dtype is torch.bfloat16
    assert torch.equal(gm(x), Made()(x))
    assert torch.float32 in [node.args[1] for node in gm.graph.nodes if node.target == "to"]


def test_devices_follow_the_input() -> None:
    with torch.device("meta"):
        assert capture(Made(), torch.empty(2, 3))(torch.empty(5, 3)).is_meta
    gm = capture(Made(), torch.empty(2, 3, device="meta"))
    assert gm(torch.ones(1, 3)).device.type == "cpu"


class DeviceKinds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.device.type == "meta" or x.dtype is torch.float16 or x.ndim != 2:
            return x
        return x + 1


def test_attributes_that_are_no_tensors_are_values() -> None:
    gm = capture(DeviceKinds(), torch.empty(2, 3, device="meta"))
    assert torch.equal(gm(torch.ones(2, 3)), torch.full((2, 3), 2.0))


# -- writes
class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        self.relu(y)
        y[:, 0] = 5
        y += 1
        y.mul_(2)
        flat = y.view(-1)
        flat.add_(1)
        F.relu(y[:, 1:], inplace=True)
        y.clamp_(max=8).unsqueeze_(0)
        return y


def test_writes_are_kept_in_order() -> None:
    model = Writes()
    gm = capture(model, torch.empty(2, 3))
    assert operator.setitem in targets(gm)
    assert_equal_at(model, gm, (2, 3), (4, 3))
    assert gm.graph.output_node().meta["val"].shape == (1, 2, 3)


def test_later_readers_see_what_was_written() -> None:
    gm = capture(Writes(), torch.empty(2, 3))
    scaled = next(node for node in gm.graph.nodes if node.target is operator.imul)
    assert next(node for node in gm.graph.nodes if node.target == "view").args[0] is scaled


class Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.exp()
        torch.rand(2)
        return x + 1


def test_only_what_has_no_effect_is_dropped() -> None:
    gm = capture(Dead(), torch.empty(2))
    assert "exp" not in targets(gm)
    torch.manual_seed(0)
    gm(torch.ones(2))
    own = torch.rand(1)
    torch.manual_seed(0)
    Dead()(torch.ones(2))
    assert torch.equal(own, torch.rand(1))


# -- regions
class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.fc(x)
        return target * self.fc(x)


def test_regions_without_gradients() -> None:
    model, x = Frozen(), torch.randn(2, 3)
    gm = capture(model, x)
    expected = torch.autograd.grad(model(x).sum(), model.fc.weight)[0]
    assert torch.equal(torch.autograd.grad(gm(x).sum(), gm.fc.weight)[0], expected)
    with torch.no_grad():
        gm(x)
        assert not torch.is_grad_enabled()


class Precise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            exact = self.fc(x)
        return exact, self.fc(x)


def test_regions_of_autocast_survive_two_captures() -> None:
    gm = capture(Precise(), torch.empty(2, 3))
    for network in (gm, capture(gm)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exact, fast = network(torch.ones(2, 3))
        assert (exact.dtype, fast.dtype) == (torch.float32, torch.bfloat16)


# -- results
class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Record:
    value: Tensor
    rest: Any = None


class Results(nn.Module):
    def forward(self, x: Tensor) -> Any:
        ordered = collections.OrderedDict(out=x)
        return Pair(x, x + 1), Record(x), ordered, {"deep": [x, (x,)]}, None, 3, x.shape[0]


def test_results_keep_their_structure() -> None:
    pair, record, ordered, nested, nothing, three, batch = capture(Results(), torch.empty(2, 3))(
        torch.ones(5, 3)
    )
    assert isinstance(pair, Pair)
    assert pair.second.sum() == 30
    assert isinstance(record, Record)
    assert record.value.shape == (5, 3)
    assert isinstance(ordered, collections.OrderedDict)
    assert isinstance(nested["deep"][1], tuple)
    assert (nothing, three, batch) == (None, 3, 5)


# -- constants
class Schedule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rates = torch.linspace(0, 1, 3).tolist()
        if torch.arange(4).sum() > 5:
            x = x * rates[1]
        return x + torch.from_numpy(torch.ones(3).numpy())


def test_numbers_of_constants_are_known() -> None:
    gm = capture(Schedule(), torch.empty(2, 3))
    assert_equal_at(Schedule(), gm, (2, 3))
    assert not gm.state_dict()
    assert [name for name, _ in gm.named_buffers()] == ["_tensor_constant0"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_looks_at_its_data_is_refused_with_the_line() -> None:
    with pytest.raises(
        CaptureError, match=r"Branching cannot be captured: bool\(\) asks .*test_graph.py:\d+"
    ):
        capture_own(Branching(), torch.empty(2, 3))
