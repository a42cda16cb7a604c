"""Forwards that assign the ``.data`` of a parameter: norms that are kept small, types, copies."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Bounded(nn.Module):
    """Scales the rows of a layer's weight down to a largest norm, before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = torch.renorm(self.layer.weight.data, 2, 0, 0.3)
        y: Tensor = self.layer(x)
        return y


class BoundedLayer(nn.Conv2d):
    """Does the same to its own weight."""

    def __init__(self) -> None:
        super().__init__(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class MaskedLayer(nn.Module):
    """Masks the weight of a layer in place."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 3, padding=1)
        self.register_buffer("mask", torch.ones(6, 6, 3, 3).tril())

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data *= self.mask
        y: Tensor = self.layer(x)
        return y


class OfType(nn.Module):
    """Moves a layer to a type which it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.layer = self.layer.to(torch.float32)
        self.layer.bias.data = self.layer.bias.data.type_as(x)  # type: ignore[union-attr]
        y: Tensor = self.layer(x)
        return y


def network(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), kind(), nn.Flatten(), nn.Linear(96, 4)), torch.randn(2, 3, 6, 6)


def trained(model: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> list[Tensor]:
    """Train for three steps, with ``masks`` held by hand, and return the outputs."""
    optimizer, found = torch.optim.SGD(model.train().parameters(), 0.5), []
    for _ in range(3):
        found.append(model(x))
        optimizer.zero_grad()
        found[-1].square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
    return found


@pytest.mark.parametrize("kind", [Bounded, BoundedLayer, MaskedLayer, OfType])
@pytest.mark.parametrize("returns", ["graph", "module"])
def test_data_of_a_parameter_made_of_itself_is_assigned_in_the_graph(
    kind: Callable[[], nn.Module], returns: Any
) -> None:
    model, x = network(kind)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxprune.capture(model, x)
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, returns=returns, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(fxprune.lower(gm).kernels) == 3
    masks, masked = fxprune.masks(pruned), copy.deepcopy(model)
    assert len(masks) == 3
    for name, mask in masks.items():
        masked.get_parameter(name).data.mul_(mask)
    for ours, own, held in ((gm, copy.deepcopy(model), {}), (pruned, masked, masks)):
        for got, wanted in zip(trained(ours, x, {}), trained(own, x, held), strict=True):
            assert torch.equal(got, wanted)
    fxprune.verify(pruned)


class Rounded(nn.Module):
    """Keeps a weight in numbers of another type, which it converts back."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        weight.data = weight.data.to(self.kind).to(torch.float32)
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("kind", [torch.float16, torch.int8])
def test_numbers_that_another_type_rounds_are_rounded_in_the_graph(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Rounded(kind), torch.randn(2, 4)
    with torch.no_grad():
        model.layer.weight.mul_(6)
    gm = fxprune.capture(copy.deepcopy(model), x)
    assert torch.equal(gm(x), model(x))


class NamedLikeOperations(nn.Module):
    """Assigns, and writes into, parameters that are called as operations are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)
        self.data, self.detach = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.kind == "assigned":
                self.layer.weight.data = self.data
            else:
                self.detach.copy_(self.data)
        return self.layer(x) @ self.detach


@pytest.mark.parametrize("kind", ["assigned", "written"])
def test_parameters_may_be_called_as_operations_are(kind: str) -> None:
    torch.manual_seed(0)
    model, x = NamedLikeOperations(kind), torch.randn(3, 4)
    overwritten = "layer.weight" if kind == "assigned" else "detach"
    # One has no graph, the other one has.
    text = "'layer.weight' not pruned" if kind == "assigned" else r"cannot be pruned.*detach \(16\)"
    with pytest.warns(UserWarning, match=text):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, returns="module", progress=False)
    assert overwritten not in fxprune.masks(pruned)
    assert "data" in fxprune.masks(pruned) or kind == "written"


class GivesBackMemory(nn.Module):
    """Halves a parameter that nothing is multiplied with, and makes tensors where the old numbers were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.unused.data = self.unused.data / 2
        results = [x]
        for _ in range(4):
            results.append(self.layer(results[-1]))
        return results[-1] if x.sum() > 0 else results[0]  # no graph


def test_tensors_in_memory_that_was_given_back_are_no_weights() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="pruned without a graph"):
        pruned = fxprune.apply(
            GivesBackMemory(),
            "magnitude",
            0.5,
            example_inputs=torch.randn(4, 4),
            returns="module",
            progress=False,
        )
    assert list(fxprune.masks(pruned)) == ["layer.weight"]
