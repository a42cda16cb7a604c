"""Copies of models: what is shared, what is not, and what ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxprune.rewrite.masking.copying import cast_numbers, duplicate


class Linked(nn.Module):
    """Its parts know it, and share a list with it and with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        for part in (self.one, self.two):
            vars(part).update(owner=self, notes=self.notes, empty=OrderedDict(), size=torch.Size([3]))
        self.again = self.one


class OwnWay(nn.Linear):
    """Says how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        result = OwnWay(self.in_features, self.out_features)
        memo[id(self)] = result
        vars(result)["way"] = "own"
        return result


class OwnState(nn.Linear):
    """Says what of it is pickled and copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": None}


def test_copies_refer_to_one_another_as_the_originals_do() -> None:
    model = Linked()
    twin = duplicate(model)
    assert twin.one is not model.one
    assert twin.again is twin.one
    assert twin.two.weight is twin.one.weight
    assert twin.one.weight is not model.one.weight
    for part in (twin.one, twin.two):
        assert vars(part)["owner"] is twin
        assert vars(part)["notes"] is twin.notes
    twin.notes.append("seen")
    vars(twin.one)["empty"]["key"] = 1
    assert model.notes == []
    assert not vars(model.one)["empty"]
    assert not vars(twin.two)["empty"]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin.one(x), model.one(x))


def test_modules_with_a_way_of_their_own_are_copied_that_way() -> None:
    model = nn.Sequential(OwnWay(2, 2), OwnState(2, 2))
    vars(model[1])["kept"] = "secret"
    twin, reference = duplicate(model), copy.deepcopy(model)
    assert vars(twin[0])["way"] == "own"
    assert vars(twin[1])["kept"] is vars(reference[1])["kept"] is None


def test_hooks_are_in_the_copy_and_those_added_later_are_not() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_hook(lambda *_: calls.append(1))
    twin = duplicate(model)
    model[1].register_forward_hook(lambda *_: calls.append(2))
    twin(torch.ones(1, 2))
    assert calls == [1]


def test_given_tensors_are_shared_or_replaced() -> None:
    layer = nn.Linear(2, 2)
    other = nn.Parameter(torch.zeros(2))
    twin = duplicate(layer, [layer.weight], {id(layer.bias): other})
    assert twin.weight is layer.weight
    assert twin.bias is other


def test_results_that_modules_keep_are_copied_as_values() -> None:
    layer = nn.Linear(2, 2)
    vars(layer)["kept"] = layer.weight * 2
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    twin = duplicate(layer)
    assert torch.equal(vars(twin)["kept"], layer.weight * 2)
    assert not vars(twin)["kept"].requires_grad


def test_complex_numbers_stay_complex() -> None:
    layer = cast_numbers(nn.Linear(2, 1, dtype=torch.complex64), torch.float64)
    assert layer.weight.dtype == torch.complex128


class Restored(nn.Module):
    """Reads its part when its state is set."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)
        self.weights = [self.part.weight]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weights = [self.part.weight]


class Shared(nn.Linear):
    """Its copies are itself, by an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        vars(self)["__deepcopy__"] = lambda memo: self


def test_modules_with_a_way_of_their_own_may_read_the_copies_of_their_parts() -> None:
    inner = fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.ReLU()))
    model = nn.Sequential(inner, nn.ReLU(), Restored(), Shared())
    twin = duplicate(model)
    assert twin[2].weights[0] is twin[2].part.weight
    assert twin[2].part.weight is not model[2].part.weight
    assert twin[3] is model[3]
    x = torch.ones(2, 3)
    assert torch.equal(twin[0](x), inner(x))
