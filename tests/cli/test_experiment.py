"""The comparison of dense, pruned and retrained networks, and the command that prints it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from training import nets

from fxprune import zoo
from fxprune.cli import run
from fxprune.cli.experiment import TrainingRecipe, accuracy, compare
from fxprune.cli.runs import SavedRun
from fxprune.cli.train import recipe_defaults, training_entries
from fxprune.training.methods import options


def data() -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(*nets.batch(0, 256)), TensorDataset(*nets.batch(1, 100))


@pytest.mark.slow
def test_four_networks() -> None:
    noted: list[tuple[str, int]] = []
    rates: dict[str, list[float]] = {}

    def note(variant: str, epoch: int, numbers: dict[str, float]) -> None:
        noted.append((variant, epoch))
        rates.setdefault(variant, []).append(numbers["sparsity"])

    found = compare(nets.mlp, *data(), TrainingRecipe(4, 32, 0.02), alpha=0.7, gamma=0.5, note=note)
    assert noted == [(variant, epoch) for variant in "DACS" for epoch in range(1, 5)]
    assert found.accuracies == {variant: curve[-1] for variant, curve in found.curves.items()}
    assert found.sparsity == pytest.approx(0.7 * 0.982, abs=0.005)
    assert rates["D"] == [0.0] * 4
    assert rates["A"] == sorted(rates["A"])
    assert set(rates["C"]) == set(rates["S"]) == {found.sparsity}
    assert found.accuracies["D"] > 0.7
    assert min(found.accuracies.values()) > 0.5
    again = compare(nets.mlp, *data(), TrainingRecipe(4, 32, 0.02), alpha=0.7, gamma=0.5)
    assert again.curves == found.curves
    one = compare(nets.mlp, *data(), TrainingRecipe(2, 32, 0.02), "rigl", 0.5, variants="A", frequency=1)
    assert list(one.curves) == ["A"]
    assert one.sparsity == pytest.approx(0.5, abs=0.01)
    dense = compare(nets.mlp, *data(), TrainingRecipe(4, 32, 0.02), variants="D")
    assert dense.curves["D"] == found.curves["D"]


def test_rates_are_never_negative() -> None:
    for kind in ("constant", "cosine", "quarter"):
        for epochs in (1, 7, 160):
            recipe = TrainingRecipe(epochs=epochs, lr=1.0, rates=kind)
            curve = [recipe.rate(epoch) for epoch in range(1, epochs + 1)]
            assert min(curve) > 0
            assert curve == sorted(curve, reverse=True)
    quarter = TrainingRecipe(epochs=160, lr=1.0, rates="quarter")
    assert quarter.rate(160) == pytest.approx(0.0888, abs=1e-4)
    assert TrainingRecipe(epochs=160, lr=1.0, rates="cosine", delta=0.02).rate(160) == pytest.approx(
        0.0009, abs=1e-4
    )


def test_accuracy_leaves_the_mode_alone() -> None:
    model = nets.mlp().train()
    test = TensorDataset(*nets.batch(0, 7))
    x, y = test.tensors
    assert accuracy(model, test, batch=3) == int((model(x).argmax(1) == y).sum()) / 7
    assert model.training


def test_refusals() -> None:
    for change in ({"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"optimizer": "lion"}, {"rates": "step"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            TrainingRecipe(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variants='DX'"):
        compare(nets.mlp, *data(), TrainingRecipe(), variants="DX")


@pytest.mark.parametrize(
    ("name", "shape", "total"),
    [
        ("lenet_300_100", (1, 28), 266_610),
        ("conv2", (1, 28), 3_317_450),
        ("conv4", (1, 28), 1_933_258),
        ("conv6", (1, 28), 1_802_698),
        ("conv2", (3, 32), 4_301_642),
        ("conv4", (3, 32), 2_425_930),
        ("conv6", (3, 32), 2_262_602),
    ],
)
def test_the_papers_networks(name: str, shape: tuple[int, int], total: int) -> None:
    channels, size = shape
    options = {} if name == "lenet_300_100" else {"channels": channels, "size": size}
    network = getattr(zoo, name)(**options)
    assert sum(p.numel() for p in network.parameters()) == total
    assert network(torch.ones(2, channels, size, size)).shape == (2, 10)


def test_images_too_small_for_their_poolings() -> None:
    with pytest.raises(ValueError, match="size"):
        zoo.conv6(size=4)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    words = ["train", "zoo:lenet_300_100", "--data", "digits", "--method", "asni", "--epochs", "2",
             "--alpha", "0.9", "--gamma", "0.5", "--batch", "200"]  # fmt: skip
    assert run([*words, "--logdir", str(tmp_path / "logs"), "--plot", str(tmp_path / "curves.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["D", "A", "C", "S", "b"]
    assert all("%" in line for line in lines)
    assert "0.000% sparse" in lines[0]
    assert "79.271% sparse" in lines[1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.name.startswith("events") for path in (tmp_path / "logs").iterdir())
    assert run([*words, "--json", "--variants", "D"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["accuracies"]) == ["D"]
    assert facts["options"] == {"alpha": 0.9, "gamma": 0.5}


FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 10)), torch.ones(1, 2, 6, 6)

def flat():
    return nn.Linear(64, 10), torch.ones(1, 64)
"""


@pytest.mark.slow
def test_networks_of_ones_own_and_of_timm(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    short = ["--epochs", "1", "--variants", "D", "--batch", "1000"]
    assert run(["train", f"{file}:net", *short]) == 0
    assert run(["train", "timm:test_resnet", *short, "--size", "16"]) == 0
    capsys.readouterr()
    for model, words in (
        (f"{file}:flat", "images"),
        ("zoo:alexnet", "the zoo has"),
        ("timm:resnet_18", "did you mean"),
        ("lenet", "expected timm"),
    ):
        assert run(["train", model, *short]) == 2
        assert words in capsys.readouterr().err
    for flags, words in (
        (["--method", "snip"], "expected one of asni"),
        (["--data", "mnist"], "data='mnist'"),
        (["--begin", "1"], "no option 'begin', nor has Pruner; methods that have it: gmp"),
        (["--resume"], "--resume: expected --out"),
        (["--epochs", "0"], "epochs=0"),
        (["--data", "cifar10", "--root", str(tmp_path)], "cifar-10-batches-py"),
    ):
        assert run(["train", "zoo:resnet20", "--variants", "A", *flags]) == 2
        assert words in capsys.readouterr().err


SHORT = ["train", "zoo:lenet_300_100", "--batch", "300", "--lr", "0.01", "--alpha", "0.9", "--json"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path: Path, capsys: Any) -> None:
    assert run([*SHORT, "--epochs", "3"]) == 0
    wanted = json.loads(capsys.readouterr().out)["curves"]
    for stop in (1, 4, 8, 11):
        out = tmp_path / str(stop)
        done: list[int] = []

        def interrupt(
            self: SavedRun, variant: str, state: Any, done: list[int] = done, stop: int = stop
        ) -> None:
            WRITE(self, variant, state)
            done.append(1)
            if len(done) == stop:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SavedRun, "write", interrupt)
            assert run([*SHORT, "--epochs", "3", "--out", str(out)]) == 130
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines()[-1] == "fxprune: error: interrupted; files are whole or not there"
        assert run([*SHORT, "--epochs", "3", "--out", str(out), "--resume"]) == 0
        assert json.loads(capsys.readouterr().out)["curves"] == wanted


WRITE = SavedRun.write


@pytest.mark.slow
def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path: Path, capsys: Any) -> None:
    kept = [*SHORT, "--out", str(tmp_path / "run")]
    assert run([*kept, "--epochs", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert run([*kept, "--epochs", "2", "--resume"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == first
    assert "this run was finished, nothing was trained" in printed.err
    assert run([*kept, "--epochs", "4", "--resume"]) == 0
    longer = json.loads(capsys.readouterr().out)
    assert longer["sparsity"] == first["sparsity"]
    assert {name: curve[:2] for name, curve in longer["curves"].items()} == first["curves"]
    assert {len(curve) for curve in longer["curves"].values()} == {4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "2"], "holds a run; --resume goes on with it"),
        (["--epochs", "2", "--seed", "1", "--resume"], "a run with seed=0, not 1"),
        (["--epochs", "1", "--resume"], "--epochs 1: the run in"),
    ],
)
def test_a_folder_of_another_run(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    kept = [*SHORT, "--out", str(tmp_path / "run"), "--variants", "D"]
    assert run([*kept, "--epochs", "2"]) == 0
    before = (tmp_path / "run" / "D.ckpt").read_bytes()
    assert run([*kept, *words]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "D.ckpt").read_bytes() == before


def test_arguments_that_are_refused_leave_no_run_behind(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "zoo:lenet_300_100", "--method", "gmp", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert run([*words, "--batch", "300"]) == 2
    assert "needs the sparsity to end at" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
    assert run([*words, "--batch", "300", "--sparsity", "0.9", "--variants", "A"]) == 0


def test_the_flags_of_train_are_read_off_the_sources() -> None:
    assert recipe_defaults() == {part.name: part.default for part in fields(TrainingRecipe)}
    for name, entry in training_entries().items():
        assert entry.options == options(name)
