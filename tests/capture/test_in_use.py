"""Fidelity in use: precision, layout, sharing, borrowed parameters, hooks, and what a size decides."""

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, weight_norm

from capture.faithful import assert_close, assert_faithful, tensors
from fxprune.capture import CaptureError, capture, capture_own

FAMILIES = ["test_resnet", "test_convnext", "test_vit", "test_mambaout"]


def assert_same(model: nn.Module, gm: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Results and gradients, in both modes, bit for bit."""
    for training in (False, True):
        runs = []
        for network in (model.train(training), gm.train(training)):
            torch.manual_seed(0)
            network.zero_grad()
            out = network(*args, **kwargs)
            loss = sum(tensor.float().square().sum() for tensor in tensors(out) if tensor.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
            runs.append((tensors(out), [p.grad for p in network.parameters() if p.grad is not None]))
        for mine, other in zip(*runs, strict=True):
            assert [t.dtype for t in mine] == [t.dtype for t in other]
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def untied(model: nn.Module, *args: Any) -> tuple[nn.Module, nn.Module]:
    """The model and its capture, which share no state."""
    return model, copy.deepcopy(capture(model, *args))


# -- precision, layout, size
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision(name: str) -> None:
    model, gm = untied(timm.create_model(name))
    size = model.pretrained_cfg["input_size"][-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, gm, torch.randn(2, 3, size, size))
        again = copy.deepcopy(capture(model))
    assert again.code == gm.code


@pytest.mark.slow
def test_channels_last() -> None:
    x = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)
    for name in FAMILIES[:2]:
        model = timm.create_model(name).to(memory_format=torch.channels_last).eval()
        gm = capture(model)
        assert torch.equal(gm(x), model(x))
        assert torch.equal(gm(x.contiguous()), model(x.contiguous()))
        features = capture(timm.create_model(name, features_only=True), torch.empty(2, 3, 96, 96))
        last = features.to(memory_format=torch.channels_last)(x)[-1]
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("test_vit", {"dynamic_img_size": True}), ("test_nfnet", {})])
def test_images_of_other_sizes_where_the_model_takes_them(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, **options).eval()
    gm = capture(model, torch.empty(2, 3, 64, 64))
    for shape in ((96, 96), (192, 128)):
        x = torch.randn(1, 3, *shape)
        assert torch.equal(gm(x), model(x))
    native = capture(timm.create_model("test_vit", dynamic_img_size=True))
    with pytest.raises(AssertionError, match="captured with size 160 in dimension 2"):
        native(torch.randn(1, 3, 96, 96))


# -- sharing
class Siamese(nn.Module):
    """One encoder for two inputs, its weights used once more by name, a tied head, lists of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.scales = nn.ParameterList([torch.ones(4), torch.zeros(4)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, ids: Tensor, other: Tensor, depth: int = 3, details: bool = False) -> dict[str, Tensor]:
        a, b = self.encoder(self.embed(ids)), self.encoder(self.embed(other))
        x = a * b + F.linear(a, self.encoder[0].weight)
        for index, layer in enumerate(self.layers[:depth]):
            x = x + layer(x) * self.scales[index % 2]
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        out = {"logits": self.head(x - self.mean)}
        return {**out, "hidden": x} if details else out


def test_shared_modules_tied_weights_and_options() -> None:
    torch.manual_seed(0)
    ids = torch.zeros(2, dtype=torch.long)
    model, gm = untied(Siamese(), {"ids": ids, "other": ids, "depth": 2, "details": True})
    assert gm.head.weight is gm.embed.weight
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"].count("encoder.0") == 2
    ids, other = torch.tensor([1, 5, 2]), torch.tensor([0, 6, 6])
    assert_same(model, gm, ids=ids, other=other, depth=2, details=True)
    assert_close(gm.mean, model.mean, "buffer written in training")


class Borrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        doubled = {"weight": self.fc.weight * 2, "bias": self.fc.bias}
        return torch.func.functional_call(self.fc, doubled, (x,)) + self.fc(x)


def test_modules_called_with_other_parameters() -> None:
    gm = assert_faithful(Borrows(), (4,))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["fc"]
    hooked = Borrows()
    hooked.fc.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(CaptureError, match="lends fc other parameters, but that has to stay whole"):
        capture_own(hooked, torch.empty(2, 4))


class Tracks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.count += 1
        return x - self.mean


def test_statistics_of_the_models_own() -> None:
    gm = assert_faithful(Tracks(), (4,))
    assert int(gm.count) == 1
    assert_faithful(nn.Sequential(Tracks(), Tracks()), (4,))


# -- hooks and parametrizations
def test_hooks_of_every_kind_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    model[1].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    model[2].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, kwargs, out: out * 2, with_kwargs=True)
    gm = capture(model, torch.empty(2, 4))
    x, gradients = torch.randn(3, 4), []
    for network in (model, gm):
        leaf = x.clone().requires_grad_()
        network(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(*gradients)


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


def parametrized(make: Callable[[nn.Module], Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    make(model[0])
    return model


@pytest.mark.parametrize(
    "make",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: parametrize.register_parametrization(module, "weight", Centred()),
    ],
)
def test_parametrizations_are_kept(make: Callable[[nn.Module], Any]) -> None:
    model, gm = untied(parametrized(make), torch.empty(2, 4))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert_same(model, gm, torch.randn(3, 4))
    alone, captured = untied(model[0], torch.empty(2, 4))
    assert_same(alone, captured, torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_norms_of_weights_by_hooks_are_kept() -> None:
    for model in (weight_norm(nn.Linear(4, 4)), nn.Sequential(weight_norm(nn.Linear(4, 4)))):
        gm, x = capture(model, torch.empty(2, 4)), torch.randn(3, 4)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("weight_g")).mul_(3)
        assert torch.equal(gm(x), model(x))


class AssignsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data = self.fc.weight.data / self.fc.weight.data.norm()
        return self.fc(x)


def test_a_module_that_assigns_its_weights_is_captured() -> None:
    model = nn.Sequential(AssignsData())
    weight = model[0].fc.weight.detach().clone()
    gm = copy.deepcopy(capture(model, torch.empty(2, 4)))
    assert torch.equal(model[0].fc.weight, weight)
    assert torch.equal(gm(torch.ones(1, 4)), model(torch.ones(1, 4)))


# -- foreign parts
def test_compiled_and_scripted_submodules() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(copy.deepcopy(inner))
    model = nn.Sequential(torch.compile(inner, backend="eager"), scripted)
    gm, x = capture(model, torch.empty(2, 4)), torch.randn(3, 4)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"][-1] == "1"
    assert torch.equal(gm(x), scripted(inner(x)))
    assert list(gm.state_dict()) == list(model.state_dict())


class Gambles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if random.random() < 0.5 else x


def test_draws_outside_pytorch_are_no_part_of_a_graph() -> None:
    with pytest.warns(
        UserWarning, match=r"0 \(Gambles\) kept whole: .*draws random.*module '0', .*test_in_use.py:\d+"
    ):
        gm = capture(nn.Sequential(Gambles()), torch.empty(2, 4))
    assert {float(gm(torch.ones(1))) for _ in range(64)} == {-1.0, 1.0}
    with pytest.raises(
        CaptureError, match=r"draws random numbers outside PyTorch.*test_in_use.py:\d+\); move"
    ):
        capture_own(Gambles(), torch.empty(2, 4))


# -- what a size or a type decides
class MasksByNumpy(nn.Module):
    """Draws a mask as a numpy array, as masking of spectrograms does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(np.random.rand(x.shape[-1]) < 0.5) if self.training else x


def test_arrays_that_numpy_draws_are_no_part_of_a_graph() -> None:
    with pytest.warns(UserWarning, match=r"0 \(MasksByNumpy\) kept whole: its forward draws random numbers"):
        gm = capture(nn.Sequential(MasksByNumpy()), torch.empty(2, 4))
    found = [gm.train()(torch.ones(1, 4)) for _ in range(20)]
    assert not all(torch.equal(found[0], other) for other in found)


class KeepsTable(nn.Module):
    """Keeps what it computes for the next call, in a buffer that is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.rand(4), persistent=False)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.register_buffer("table", torch.arange(x.shape[1])[:, None] * self.slopes, persistent=False)
        result: Tensor = x + self.table[: x.shape[1]]
        return result


@pytest.mark.filterwarnings("ignore:capture:UserWarning")
def test_a_run_beside_draws_starts_from_the_model_as_it_was() -> None:
    model, x = nn.Sequential(KeepsTable(), Gambles()), torch.randn(2, 3, 4)
    gm = capture(model, x)
    assert model[0].table is None
    longer = torch.randn(1, 5, 4)
    random.seed(0)
    wanted = [model(x), model(longer)]
    random.seed(0)
    assert all(map(torch.equal, [gm(x), gm(longer)], wanted))


class ByBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return x * 2
        return x[: x.shape[0] // 2] if x.shape[0] > 4 else x


def test_decisions_by_the_batch_size_are_checked() -> None:
    gm = capture(nn.Sequential(ByBatch()), torch.empty(2, 4))
    for network in (gm, pickle.loads(pickle.dumps(gm)), capture(gm)):
        assert network(torch.ones(3, 4)).shape == (3, 4)
        with pytest.raises(AssertionError, match=r"decides by the size of its inputs .*2 != 1.*again"):
            network(torch.ones(1, 4))
        with pytest.raises(AssertionError, match=r"captured where 2 <= 4"):
            network(torch.ones(8, 4))
    with pytest.warns(UserWarning, match="the graph holds for the batch size of example_inputs"):
        assert capture(ByBatch(), torch.empty(1, 4))(torch.ones(1, 4)).sum() == 8


class ByType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.dtype == torch.float32 else x


def test_decisions_by_the_type_stay_with_their_module() -> None:
    with pytest.warns(UserWarning, match="0 .ByType. kept whole: it does something else in other types"):
        gm = capture(nn.Sequential(ByType()), torch.empty(2, 4))
    assert gm(torch.ones(1).double()).tolist() == [1]
    with pytest.warns(
        UserWarning, match="ByType: it does something else in other types; the graph holds for"
    ):
        capture(ByType(), torch.empty(2, 4))


class ByOptions(nn.Module):
    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        return x * options["scale"] * options["more"][0]


def test_constants_inside_arguments_are_checked() -> None:
    gm = capture(ByOptions(), (torch.empty(2), {"scale": 2, "more": (3,)}))
    assert gm(torch.ones(1), {"scale": 2, "more": (3,)}).tolist() == [6]
    with pytest.raises(AssertionError, match=r"options\['scale'\]: ByOptions was captured with 2"):
        gm(torch.ones(1), {"scale": 5, "more": (3,)})
    with pytest.raises(AssertionError, match=r"options\['more'\]\[0\]: ByOptions was captured with 3"):
        gm(torch.ones(1), {"scale": 2, "more": (4,)})
