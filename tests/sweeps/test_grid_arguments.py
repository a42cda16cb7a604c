"""Sides of a grid that do not fit are refused before any cell is done."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"sparsities": [0.5, 50]}, ValueError, r"^sparsities: 50: expected a fraction.*50 percent is 0\.5$"),
        ({"sparsities": "0.5"}, TypeError, "^sparsities='0.5': expected a list of fractions"),
        ({"sparsities": ["0.5"]}, TypeError, "^sparsities: '0.5': expected a fraction"),
        ({"seeds": 0.5}, TypeError, r"^seeds=0\.5: expected a list of integers"),
        ({"seeds": [-1]}, TypeError, "^seeds: -1: expected an integer of at least 0"),
        ({"model_fn": net()}, TypeError, "^model_fn: expected a function that makes the network, got a Seq"),
        (
            {"train_fn": lambda model: 0.5},
            TypeError,
            r"^train_fn: .*, seed\) .* one of \(model\)$",
        ),
        ({"model_fn": lambda width: net()}, TypeError, r"^model_fn: expected .*, got one of \(width\)$"),
        ({"data": lambda: None}, TypeError, r"^data: a function is called with the seed of .* one of \(\)$"),
        ({"progress": "no"}, TypeError, r"^progress='no': expected True or False$"),
        ({"methods": ["gmp"]}, ValueError, "^methods: 'gmp' prunes while a network trains.*fxprune.Pruner"),
        ({"train_fn": 3}, TypeError, "^train_fn: expected a function of .*, got a int"),
    ],
)
def test_wrong_sides_are_named_before_anything_is_trained(
    given: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    def train(model: nn.Module, seed: int) -> float:
        raise AssertionError("trained")

    wish: dict[str, Any] = {"model_fn": net, "methods": ["magnitude"], "sparsities": [0.5], "train_fn": train,
                            "folder": tmp_path / "new", "example_inputs": torch.ones(1, 6)}  # fmt: skip
    with pytest.raises(error, match=words):
        fxprune.sweep(**{**wish, **given})
    assert not (tmp_path / "new").exists()


def test_a_file_for_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="there is a file of that name; expected a folder"):
        fxprune.sweep(net, ["magnitude"], [0.5], folder=tmp_path / "file")


def test_one_sparsity_and_one_seed_need_no_list(tmp_path: Path) -> None:
    given = {"folder": tmp_path, "example_inputs": torch.ones(1, 6), "progress": False}
    found = fxprune.sweep(net, "magnitude", 0.5, 3, **given)  # type: ignore[arg-type]
    assert [(row["sparsity"], row["seed"]) for row in found.rows] == [(0.5, 3)]


def test_a_result_that_is_no_number_is_shown(tmp_path: Path) -> None:
    given = {"folder": tmp_path, "example_inputs": torch.ones(1, 6), "progress": False}
    with pytest.warns(UserWarning, match="train_fn returned 'good': expected an accuracy, or a dict"):
        found = fxprune.sweep(net, ["magnitude"], [0.5], train_fn=lambda m, s: "good", **given)  # type: ignore
    assert str(found).startswith("no cell is done\nfailed: dense-0.0-0: train_fn returned")


@pytest.mark.parametrize("seeds", [np.arange(2), torch.arange(2)])
def test_sides_may_be_arrays_and_tensors(seeds: Any, tmp_path: Path) -> None:
    sparsities = torch.tensor([0.25, 0.5])
    found = fxprune.sweep(
        net, ["magnitude"], sparsities, seeds=seeds, folder=tmp_path, example_inputs=torch.ones(1, 6)
    )
    cells = {(row["sparsity"], row["seed"]) for row in found.rows}
    assert cells == {(0.25, 0), (0.25, 1), (0.5, 0), (0.5, 1)}


@pytest.mark.parametrize(
    ("methods", "error", "words"),
    [
        (["magnitude", "snip"], ValueError, r"^method 'snip' needs data=\.\.\., a pair"),
        ({"ours": ("snip", {})}, ValueError, r"^'ours': method 'snip' needs data=\.\.\., a pair"),
        ({"ours": ("magnitude", {"buget": "erk"})}, TypeError, r"^'ours': .* did you mean 'budget'\?$"),
        ({"ours": ("magnitude", {"exclude": "head"})}, ValueError, "^'ours': exclude: 'head' fits nothing"),
    ],
)
def test_a_method_that_cannot_run_is_refused_before_the_first_cell(
    methods: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    def train(model: nn.Module, seed: int) -> float:
        raise AssertionError("trained")

    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        fxprune.sweep(net, methods, [0.5, 0.9], train_fn=train, folder=tmp_path / "new",
                      example_inputs=torch.ones(1, 6))  # fmt: skip
    assert not (tmp_path / "new").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_that_is_none_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^folder: got a int, expected the name of a folder, as in 'results'$"
    ):
        fxprune.sweep(net, ["magnitude"], [0.5], folder=3)  # type: ignore[arg-type]
