"""Layers inside of modules that stay whole lose channels; what such a module does in training stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import redrawn

X = torch.randn(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Keeps a table for the size of its input, as detectors do, and gives more in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.out = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.seen: tuple[int, ...] = ()
        self.places = torch.zeros(0)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.depthwise(self.norm(self.stem(x)).relu())
        return y

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raw = self.out(self.inner(x))
        if self.training:
            return {"raw": raw}
        if self.seen != tuple(x.shape):
            self.places, self.seen = torch.arange(x.shape[2] * x.shape[3]).to(x), tuple(x.shape)
        return {"raw": raw, "boxes": raw.flatten(2) + self.places}


class WritesInEvaluation(Head):
    """Writes into what evaluation alone has made, and calls a layer with it."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        if not self.training:
            points = found["raw"].clone()
            points[:, 1::2] = points[:, 1::2].sigmoid()
            found["points"] = self.decode(points)
        return found


class Gate(nn.Module):
    """Goes by the numbers in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Gated(Head):
    """Has a part of which no graph says what it does for other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def inner(self, x: Tensor) -> Tensor:
        return super().inner(self.gate(x))


class CountsInTraining(Head):
    """Has the width of an inner layer in the code that training alone runs."""

    def inner(self, x: Tensor) -> Tensor:
        y = super().inner(x)
        return y.unflatten(1, (4, 2)).flatten(1, 2) if self.training else y


class WiderInTraining(Head):
    """Gives what an inner layer computes in training alone."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return {"raw": self.inner(x)} if self.training else found


class MeanInTraining(Head):
    """Gives a mean over the channels of an inner layer in training alone, in a size that tells nothing."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return {**found, "mean": self.inner(x).mean(1)} if self.training else found


class DropsInTraining(Head):
    """Draws other numbers where an inner layer has fewer channels."""

    def inner(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().inner(x), 0.5, self.training)


class Detector(nn.Module):
    def __init__(self, head: type[Head]) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 3, padding=1), head()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.head(self.first(x).relu())
        return found


def pruned(head: type[Head]) -> nn.Module:
    net = redrawn(Detector(head)).eval()
    return fxprune.apply(net, "random", 0.6, example_inputs=X, granularity="channel", progress=False)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("kind", [Head, WritesInEvaluation])
def test_layers_of_a_module_that_stays_whole_get_smaller_and_it_still_trains(
    kind: type[Head], tmp_path: Path
) -> None:
    masked = pruned(kind)
    small = fxprune.compact(masked, X)
    head = small.get_submodule("head")
    assert isinstance(head, Head), "the module itself is called"
    table = small.meta["fxprune"]["compaction"]
    assert sum(layer.given_back for layer in table.layers) == 0
    width = head.stem.out_channels
    assert width < 8
    assert head.depthwise.groups == head.depthwise.out_channels == head.out.in_channels == width
    assert head.norm.num_features == width
    with torch.no_grad():
        for size in ((3, 3, 8, 6), (1, 3, 5, 7)):
            x = torch.randn(size, generator=torch.Generator().manual_seed(1))
            assert_equal(masked(x), small(x))
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", Detector(kind)).eval()
    with torch.no_grad():
        assert_equal(small(X), loaded(X))
    assert_equal(masked.train()(X), small.train()(X))
    small(X)["raw"].square().sum().backward()
    trained = [name for name, parameter in small.named_parameters() if "decode" not in name]
    assert all(small.get_parameter(name).grad is not None for name in trained)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("kind", [Head, WritesInEvaluation])
def test_a_module_that_has_its_table_for_the_examples_already_gets_smaller(kind: type[Head]) -> None:
    net = redrawn(Detector(kind)).eval()
    with torch.no_grad():
        net(X)
    masked = fxprune.apply(net, "random", 0.6, example_inputs=X, granularity="channel", progress=False)
    small = fxprune.compact(masked, X)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert small.get_submodule("head.stem").out_channels < 8
    with torch.no_grad():
        for size in ((3, 3, 8, 6), (1, 3, 5, 7), (3, 3, 8, 6)):
            x = torch.randn(size, generator=torch.Generator().manual_seed(1))
            assert_equal(masked(x), small(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("head", [CountsInTraining, WiderInTraining, MeanInTraining, Gated])
def test_layers_stay_where_training_or_other_numbers_may_need_their_width(head: type[Head]) -> None:
    masked = pruned(head)
    small = fxprune.compact(masked, X)
    assert small.get_submodule("head.stem").out_channels == 8
    reasons = {layer.reason for layer in small.meta["fxprune"]["compaction"].layers if layer.given_back}
    assert reasons, "the table says why"
    assert_equal(masked(X), small(X))
    assert_equal(masked.train()(X), small.train()(X))


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("verify", [True, False])
def test_a_constant_that_a_layer_inside_reads_stays(verify: bool) -> None:
    net = redrawn(Detector(Head)).eval()
    with torch.no_grad():
        net.head.stem.weight[:3].zero_()  # the norm and the bias still give numbers
        net.head.stem.weight[5].zero_()
        net.head.out.weight[:, 5].zero_()
    small = fxprune.compact(net, X, verify=verify)
    assert small.get_submodule("head.stem").out_channels == 7
    with torch.no_grad():
        assert_equal(net(X), small(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
def test_layers_get_smaller_where_training_draws_random_numbers() -> None:
    masked = pruned(DropsInTraining)
    small = fxprune.compact(masked, X)
    assert small.get_submodule("head.stem").out_channels < 8
    assert_equal(masked(X), small(X))


class NoisyExperts(nn.Module):
    """Gates with noise as in Shazeer et al. 2017, and calls an expert where a row asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.noise = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        top, chosen = logits.topk(2, -1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, chosen, top).softmax(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            hit = (chosen == number).any(-1)
            if hit.any():
                result[hit] += weights[hit, number : number + 1] * expert(x[hit])
        return result


@pytest.mark.filterwarnings("ignore:capture")
def test_layers_get_smaller_in_code_that_decides_by_numbers() -> None:
    """Units that an expert hides go; what code adds up, in a tensor as wide as its input, is given back."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), NoisyExperts(), nn.Linear(8, 3)), torch.randn(7, 6)
    options = {"granularity": "channel", "example_inputs": x, "progress": False}
    pruned = fxprune.apply(model, "magnitude", 0.4, **options).eval()
    small = fxprune.compact(pruned, x)
    experts = small.get_submodule("1").experts
    assert {len(expert[2].weight) for expert in experts} == {8}
    masks = fxprune.masks(pruned)
    left = [int(masks[f"1.experts.{number}.0.weight"].any(1).sum()) for number in range(3)]
    assert [len(expert[0].weight) for expert in experts] == left
    assert sum(left) < 48
    for batch in (1, 4, 30):
        x = torch.randn(batch, 6)
        assert torch.allclose(small(x), pruned(x), atol=1e-6)
    small.train()(x).sum().backward()
    assert experts[0][0].weight.grad is not None
