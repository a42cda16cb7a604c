"""Parameters that hold no numbers are named, wherever a network is pruned, compacted or written."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune
from fxprune.finite import strange_parameters

X = torch.ones(2, 4)
NAMED = r"^model: parameters hold NaN or infinite numbers: 0\.weight, 2\.bias; "


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def broken() -> nn.Module:
    found = net()
    with torch.no_grad():
        found[0].weight[1, 2] = float("nan")
        found[2].bias[0] = -float("inf")
    return found


def test_names_of_all_types() -> None:
    model = nn.Module()
    for name, dtype in (("short", torch.float16), ("brain", torch.bfloat16), ("complex", torch.complex64)):
        model.register_parameter(name, nn.Parameter(torch.ones(3, dtype=dtype)))
    eight = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    model.register_parameter("eight", nn.Parameter(eight, requires_grad=False))
    model.register_parameter("whole", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    model.register_parameter("hollow", nn.Parameter(torch.ones(3, device="meta")))
    assert strange_parameters(model) == ["eight"]
    with torch.no_grad():
        model.get_parameter("brain")[1] = float("inf")
        model.get_parameter("complex")[2] = complex(0, float("nan"))
    assert strange_parameters(model) == ["brain", "complex", "eight"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["random", "dpai"])
def test_methods_that_look_at_no_weights(method: str) -> None:
    with pytest.warns(UserWarning, match=NAMED + "look for what made them so") as caught:
        fxprune.apply(broken(), method, 0.5, example_inputs=X, progress=False)
    assert caught[0].filename == __file__


def test_pruning_in_training() -> None:
    with pytest.warns(UserWarning, match=NAMED) as caught:
        fxprune.Pruner(broken(), "gmp", 0.5, total=2, example_inputs=X)
    assert caught[0].filename == __file__


def test_compaction() -> None:
    with pytest.warns(UserWarning, match=NAMED + "outputs that are no numbers are not compared") as caught:
        fxprune.compact(broken(), X)
    assert caught[0].filename == __file__


def test_export(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=NAMED + "they are written as they are") as caught:
        fxprune.export(broken(), tmp_path / "net.pt2", X)
    assert any(one.filename == __file__ for one in caught)


@pytest.mark.parametrize("call", [
    lambda model: fxprune.apply(model, "random", 0.5, example_inputs=X, progress=False),
    lambda model: fxprune.compact(model, X),
])  # fmt: skip
def test_networks_of_numbers_are_not_warned_of(call: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(net())


def test_many_names_are_cut_short() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"0\.weight, 1\.weight, 2\.weight and 2 more; "):
        fxprune.apply(model, "random", 0.5, example_inputs=X, progress=False)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:Sparse CSR tensor support")
def test_parameters_of_other_kinds() -> None:
    model = nn.Module()
    numbers = torch.eye(3)
    model.sparse = nn.Parameter(numbers.to_sparse())
    model.rows = nn.Parameter(numbers.to_sparse_csr())
    model.turned = nn.Parameter(numbers.to(torch.complex64).conj())
    model.nested = nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]))
    with FakeTensorMode():
        model.shape = nn.Parameter(torch.empty(3))
    assert strange_parameters(model) == []
    model.bad = nn.Parameter((numbers * float("inf")).to_sparse())
    assert strange_parameters(model) == ["bad"]


def test_what_has_no_shape_yet_is_told_as_such() -> None:
    with pytest.raises(ValueError, match="has no shape yet; run the model once"):
        fxprune.compact(nn.Sequential(nn.LazyLinear(3)), X)
