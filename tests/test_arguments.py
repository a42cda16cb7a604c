"""Flags and functions that cannot be meant are refused, at the doors that take them, before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.arguments import takes

X, Y = torch.ones(4, 6), torch.arange(4) % 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def masked() -> nn.Module:
    model = net()
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:4] = False
    fxprune.set_masks(model, {"0.weight": mask, "2.weight": torch.ones(3, 8, dtype=torch.bool)})
    return model


FLAGS: list[tuple[str, Callable[[Any], Any]]] = [
    ("exact", lambda flag: fxprune.compact(masked(), X, exact=flag)),
    ("verify", lambda flag: fxprune.compact(masked(), X, verify=flag)),
    ("fold_constants", lambda flag: fxprune.compact(masked(), X, fold_constants=flag)),
    ("bias", lambda flag: fxprune.reconstruct(masked(), X, net(), bias=flag)),
    ("norms", lambda flag: fxprune.reconstruct(masked(), X, net(), norms=flag)),
    ("propagate", lambda flag: fxprune.reconstruct(masked(), X, net(), propagate=flag)),
    ("whole_heads", lambda flag: fxprune.channel_groups(net(), X, whole_heads=flag)),
    ("whole_heads", lambda flag: fxprune.regularizer("greg", net(), example_inputs=X, whole_heads=flag)),
    ("latency", lambda flag: fxprune.sweep(net, ["magnitude"], [0.5], folder="results", latency=flag)),
]


@pytest.mark.parametrize(("argument", "call"), FLAGS)
def test_a_word_is_no_flag(
    argument: str, call: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"^{argument}='no': expected True or False$"):
        call("no")
    assert not list(tmp_path.iterdir())


LOSSES: list[Callable[[Any], Any]] = [
    lambda loss: fxprune.evaluate(net(), (X, Y), loss_fn=loss),
    lambda loss: fxprune.recalibrate(nn.Sequential(nn.BatchNorm1d(6)), X, loss_fn=loss),
    lambda loss: fxprune.reconstruct(masked(), X, net(), loss_fn=loss),
    lambda loss: fxprune.apply(net(), "snip", 0.5, data=(X, Y), loss_fn=loss),
]


@pytest.mark.parametrize("call", LOSSES)
def test_a_loss_is_a_function_of_two(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^loss_fn='ce': expected a function of \(output, target\)$"):
        call("ce")
    with pytest.raises(
        TypeError, match=r"^loss_fn: it is called with \(output, target\), or .* of \(output\)$"
    ):
        call(lambda output: output.sum())


def test_functions_that_do_not_say_what_they_take() -> None:
    assert takes(max, 2)
    assert takes(lambda *values: 0, 7)
    assert not takes(lambda: 0, 1)


def test_a_method_finds_by_a_function_of_a_problem() -> None:
    with pytest.raises(TypeError, match=r"^method 'mine': find is called with a Problem, got one of \(\)$"):
        fxprune.Method("mine", lambda: {})  # type: ignore[misc, arg-type]
