"""Enter modules that keep what they compute from their parameters, and no others that write attributes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from capture.test_leaves import called
from fxprune.capture import capture


class Biased(nn.Module):
    """Attention-like sums with a table of biases that is kept in evaluation, as LeViT does."""

    def __init__(self, early: bool = False, constant: bool = False) -> None:
        super().__init__()
        self.early, self.layer = early, nn.Linear(4, 4)
        self.table, self.cache = nn.Parameter(torch.randn(3, 4)), dict[str, Tensor]()
        self.register_buffer("rows", torch.tensor([2, 0]), persistent=False)
        self.scale = torch.tensor([2.0, 3.0, 4.0, 5.0]) if constant else 1.0

    def biases(self) -> Tensor:
        if self.training:
            return self.table[self.rows] * self.scale
        if "table" not in self.cache:
            self.cache["table"] = self.table[self.rows] * self.scale
        return self.cache["table"]

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            biases = self.biases()
            return self.layer(x) + biases
        return self.layer(x) + self.biases()


@pytest.mark.parametrize(
    "options", [{}, {"early": True}, {"constant": True}, {"early": True, "constant": True}]
)
def test_a_kept_table_is_computed_in_the_graph(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Biased(**options), nn.ReLU(), Biased(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = capture(model.eval(), torch.ones(5, 2, 4))
    assert called(gm) == ["0.layer", "1", "2.layer"]
    assert all(not part.cache for part in (model[0], model[2]))
    x = torch.randn(3, 2, 4)
    fresh = copy.deepcopy(model)
    assert torch.equal(gm.eval()(x), fresh(x))
    assert torch.equal(gm.train()(x), model.train()(x))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            parameter.mul_(2)
            model.get_parameter(name).copy_(parameter)
    assert torch.equal(gm.eval()(x), model.eval()(x))  # its caches are empty still
    assert not fxprune.lower(gm).opaque


def test_a_table_kept_by_an_earlier_run_is_computed_in_the_graph_if_it_still_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Biased(), nn.ReLU(), Biased(constant=True)).eval()
    x = torch.randn(3, 2, 4)
    expected = model(x)
    kept = model[0].cache["table"]
    gm = capture(model, torch.ones(5, 2, 4))
    assert called(gm) == ["0.layer", "1", "2.layer"]
    assert model[0].cache["table"] is kept
    assert torch.equal(gm(x), expected)
    with torch.no_grad():
        model[0].table.add_(1)
    stale = capture(model, torch.ones(5, 2, 4))
    assert torch.equal(stale(x), model(x))  # what was kept counts, as in the model


class Tables(nn.Module):
    """Tensors in a dictionary that no run fills."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tables = nn.Linear(4, 4), {"shift": torch.arange(4.0)}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.tables["shift"]


def test_a_dictionary_of_constants_is_no_cache() -> None:
    model = nn.Sequential(Tables())
    gm = capture(model, torch.ones(3, 4))
    assert called(gm) == ["0.layer"]
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model(x))
    assert list(model[0].tables) == ["shift"]


class KeepsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean(0)
        return self.layer(x) + self.first


class KeepsDraws(KeepsInput):
    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = torch.randn(4)
        return self.layer(x) + self.first


@pytest.mark.parametrize("kind", [KeepsInput, KeepsDraws])
def test_what_comes_from_an_input_or_from_chance_is_no_table(kind: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="kept whole: its forward writes its attribute 'first'"):
        gm = capture(nn.Sequential(kind()), torch.ones(3, 4))
    assert called(gm) == ["0"]


class Chooses(nn.Module):
    """A forward that is chosen when the module is made, as FasterNet's partial convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.forward = self.forward_twice  # type: ignore[method-assign]

    def forward_twice(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_forward_that_an_instance_has_is_entered() -> None:
    gm = capture(nn.Sequential(Chooses()), torch.ones(3, 4))
    assert called(gm) == ["0.layer", "0.layer"]


@pytest.mark.filterwarnings("ignore:.*kept whole")
@pytest.mark.parametrize("change", ["half", "meta"])
def test_a_table_kept_in_another_type_or_place_is_no_obstacle(change: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Biased(), nn.ReLU()).eval(), torch.randn(3, 2, 4)
    model(x)
    model = model.half() if change == "half" else model.to("meta")
    if change == "meta":
        model[0].cache["table"] = model[0].cache["table"].to("meta")
    gm = capture(model, torch.ones(5, 2, 4, dtype=torch.float16 if change == "half" else torch.float32))
    assert "0" in called(gm) or "0.layer" in called(gm)
