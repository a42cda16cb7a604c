"""The GraphModule as a module: keys, sharing, copies, files, compilers; and the model it was made from."""

import copy
import io
import operator
import pickle
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.capture import CaptureError, ModeSwitch, capture, capture_own
from fxprune.capture.module import reserved_names


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.5)])
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.spare = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.ones(4), persistent=False)
        self.table = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(self.a(x))))
        for block in self.blocks:
            x = block(x)
        x = F.dropout(x, 0.1, self.training)
        return F.linear(x, self.a.weight) * self.scale + self.offset + self.table


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Everything:
    return Everything().eval()


def test_parameters_submodules_and_keys_are_the_models(model: Everything) -> None:
    gm = capture(model, X)
    assert type(gm).__name__ == "Everything"
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(gm.get_parameter(name) is parameter for name, parameter in model.named_parameters())
    assert [name for name, _ in gm.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert gm.norm is model.norm
    assert isinstance(gm.blocks, nn.ModuleList)
    gm.graph.lint()


def test_copies_and_pickles_are_complete(model: Everything) -> None:
    gm = capture(model, X)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    pickled = pickle.loads(pickle.dumps(gm))
    twice = pickle.loads(pickle.dumps(copy.deepcopy(pickled)))
    result = model(X)
    for other in (copy.deepcopy(gm), pickled, twice, torch.load(file, weights_only=False)):
        assert torch.equal(other(X), result)
        assert list(other.state_dict()) == list(gm.state_dict())
        assert other.a.weight is other.b.weight
        assert other.a.weight is not gm.a.weight
        assert "offset" in dict(other.named_buffers())
        assert type(other).__name__ == "Everything"
        for mine, its in zip(gm.graph.nodes, other.graph.nodes, strict=True):
            assert (mine.op, mine.name, str(mine.args)) == (its.op, its.name, str(its.args))
            assert type(its.meta["val"]) is type(mine.meta["val"])
        torch.manual_seed(0)
        expected = gm.train()(X)
        torch.manual_seed(0)
        assert torch.equal(other.train()(X), expected)
        gm.eval()


class Rolls(nn.Module):
    """Writes by index: ``torch.fx`` would re-trace these on unpickling, and its proxies refuse them."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[1:])
        for count, part in enumerate((slice(0, 2), slice(2, None))):
            mask[part] = count
        y = x.clone()
        y[:, mask > 0] = 3.0
        return y + mask


def test_writes_by_index_are_pickled_and_copied() -> None:
    gm = capture(Rolls(), X)
    file = io.BytesIO()
    torch.save({"model": [gm]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)["model"][0]
    assert operator.setitem in [node.target for node in gm.graph.nodes]
    for other in (saved, copy.deepcopy(saved), pickle.loads(pickle.dumps(copy.deepcopy(gm)))):
        assert [node.target for node in other.graph.nodes] == [node.target for node in gm.graph.nodes]
        assert other.code == gm.code
        assert torch.equal(other(X), Rolls()(X))


def test_hooks_are_copied(model: Everything) -> None:
    model.register_forward_hook(lambda module, args, out: out + 1)
    gm = capture(model, X)
    assert torch.equal(copy.deepcopy(gm)(X), model(X))


@pytest.mark.slow
def test_capturing_again_gives_the_same_graph() -> None:
    model = timm.create_model("test_vit", attn_drop_rate=0.2, drop_path_rate=0.2)
    once = capture(model)
    twice = capture(once)
    thrice = capture(twice, torch.empty(2, 3, 160, 160))
    assert list(once.state_dict()) == list(thrice.state_dict())
    assert thrice.code == twice.code
    count = [sum(isinstance(module, ModeSwitch) for module in gm.modules()) for gm in (once, twice, thrice)]
    assert count[0] == count[1] == count[2] > 0
    x = torch.randn(1, 3, 160, 160)
    results = []
    for network in (model.train(), once.train(), thrice.train()):
        torch.manual_seed(0)
        results.append(network(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_model_is_untouched(model: Everything) -> None:
    model.train()
    model.blocks.eval()
    calls = []
    model.a.register_forward_hook(lambda *args: calls.append(args))
    before = copy.deepcopy(model)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    capture(model, X)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not calls
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]
    assert "__call__" in vars(nn.Module)


def test_a_failing_capture_leaves_everything_as_it_was(model: Everything) -> None:
    call = nn.Module.__call__
    with pytest.raises(ValueError, match="does not accept"):
        capture(model, torch.ones(2, 9))
    assert nn.Module.__call__ is call
    assert not any(module.training for module in model.modules())
    assert model(X).shape == (5, 4)


@pytest.mark.slow
def test_compiles_and_exports_whole() -> None:
    model = timm.create_model("test_vit", attn_drop_rate=0.2, drop_path_rate=0.2).eval()
    gm = capture(model)
    x = torch.randn(2, 3, 160, 160)
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert torch.allclose(torch.export.export(gm, (x,)).module()(x), model(x), atol=1e-5)
    gm.train()
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())


@pytest.mark.slow
def test_other_precisions_of_the_whole_network() -> None:
    model = timm.create_model("test_vit").eval()
    gm = capture(model)
    x = torch.randn(1, 3, 160, 160)
    for network in (gm, model):
        network.double()
    assert torch.equal(gm(x.double()), model(x.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gm.float()(x), model.float()(x))


class Named(nn.Module):
    """A part by any name: a layer, a vector, or a tensor that is registered nowhere."""

    def __init__(self, name: str, part: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        setattr(self, name, part)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y, part = self.first(x), getattr(self, self.name)
        return part(y) if isinstance(part, nn.Module) else y * part


@pytest.mark.parametrize(
    "name", ["code", "graph", "recompile", "print_readable", "meta", "leaf_attributes", "left_behind"]
)
@pytest.mark.parametrize(
    "part", [lambda: nn.Linear(4, 4), lambda: nn.Parameter(torch.rand(4)), lambda: torch.rand(4)]
)
def test_a_part_with_the_name_of_an_attribute_of_graph_modules(name: str, part: Any) -> None:
    """No module of torch.fx can hold it; inside of another module it may have the name."""
    model, x = Named(name, part()), torch.rand(2, 3)
    with pytest.raises(CaptureError, match=f"cannot be captured: '{name}' is one of its parts"):
        capture_own(model, x)
    with pytest.warns(UserWarning, match="its parts are called model"):
        assert torch.equal(fxprune.capture(model, x)(x), model(x))
    whole = nn.Sequential(model)
    gm = fxprune.capture(whole, x)
    assert torch.equal(gm(x), whole(x))
    assert list(gm.state_dict()) == list(whole.state_dict())
    copied = pickle.loads(pickle.dumps(gm))
    assert torch.equal(copied(x), whole(x))


def test_every_name_that_is_no_attribute_of_modules_is_reserved() -> None:
    """A graph module with each of these parts would lose the part or itself."""
    names = reserved_names()
    assert {"code", "graph", "_graph", "_code", "meta", "recompile", "add_submodule", "to_folder"} <= names
    assert not names & {"forward", "weight", "layer", "training", "children", "_modules"}


def test_a_method_that_stayed_behind_names_the_way_to_keep_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return self.fc(x) if labels is None else self.fc(x).sum() + labels

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    gm = fxprune.capture(Net(), torch.ones(2, 4))
    for found in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), fxprune.capture(gm)):
        with pytest.raises(AttributeError, match=r"'forward_features'.*returns='module' to keep them"):
            _ = found.forward_features
        with pytest.raises(AttributeError, match=r"has no attribute 'nonsense'$"):
            _ = found.nonsense
        assert not hasattr(found, "forward_features")
    with pytest.raises(AssertionError, match=r"labels.*or prune with returns='module', which takes any"):
        gm(torch.ones(2, 4), torch.ones(()))
