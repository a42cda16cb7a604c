"""``fxprune prune``: what it prints and writes, and what can be read back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.cli import run


def test_prune_prints_writes_and_can_be_read_back(file: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "pruned"
    words = [f"{file}:small", "--method", "synflow", "--rounds", "5", "--sparsity", "0.5", "--seed", "3"]
    assert run(["prune", *words, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "sparsity 50.0000%" in printed.out
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "report.json"]
    assert f"file: 720 B dense -> {(out / 'model.safetensors').stat().st_size / 1e3:.1f} kB" in printed.out

    report = json.loads((out / "report.json").read_text())
    assert (report["method"], report["seed"], report["sparsity"]) == ("synflow", 3, 0.5)
    masks = fxprune.load_masks(out / "model.safetensors")
    assert sum(int(mask.sum()) for mask in masks.values()) == report["kept_params"] == 80
    weights = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    again = fxprune.load(out / "model.safetensors", weights)
    assert all(not bool(again.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    assert fxprune.rewrite.read_header(out / "model.safetensors")["form"] == "sparse"

    assert run(["analyze", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["effective_params"] == report["effective_params"]
    assert again["log_paths"] == report["log_paths"]
    assert again["method"] == "synflow"


@pytest.mark.slow
def test_the_weights_are_those_of_the_seed(file: str, tmp_path: Path, capsys: Any) -> None:
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        words = ["prune", f"{file}:small", "-m", "magnitude", "-s", "0.5", "--seed", seed]
        assert run([*words, "--out", str(tmp_path / name)]) == 0
    one, same, other = (
        fxprune.load_masks(tmp_path / name / "model.safetensors") for name in ("one", "same", "other")
    )
    assert all(torch.equal(mask, same[name]) for name, mask in one.items())
    assert any(not torch.equal(mask, other[name]) for name, mask in one.items())


def test_options_budget_exclude_and_data(file: str, capsys: Any) -> None:
    words = ["prune", f"{file}:small", "-m", "snip", "--mode", "eval", "--data", f"{file}:data", "--json"]
    assert run([*words, "-s", "0.25", "--exclude", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"] == {"mode": "eval"}
    assert [layer["kept_params"] for layer in report["layers"].values()] == [72, 64]
    assert run(["prune", f"{file}:small", "-m", "random", "--budget", "0=0.5, 2=0.25", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["density"] for layer in layers.values()] == [0.5, 0.75]


@pytest.mark.slow
def test_prune_compact_measures_writes_and_exports(
    file: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "prune",
        f"{file}:small",
        "-m",
        "magnitude",
        "-s",
        "0.5",
        "--granularity",
        "channel",
        "--compact",
    ]
    assert run([*words, "--out", "out", "--export", "net.pt2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(Path("out/report.json").read_text())
    assert report["milliseconds"].keys() == {"dense", "compact"}
    names = ["compact.safetensors", "model.safetensors", "report.json"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    assert {name: Path("out", name).stat().st_size for name in names[:2]} == {
        name: size for name, size in report["bytes"].items() if name != "dense"
    }
    fresh = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    small, masked = (fxprune.load(Path("out", name), fresh).eval() for name in names[:2])
    assert small.get_parameter("0.weight").shape[0] < 16
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert torch.allclose(small(x), masked(x), atol=1e-6)
        assert torch.allclose(small(x), torch.export.load("net.pt2").module()(x), atol=1e-6)
    assert run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("compact: ")
    assert re.fullmatch(
        r"time: [\d.]+ ms dense, [\d.]+ ms compact \(eager, batch 1, medians of \d+ runs in turn\)", lines[-1]
    )


@pytest.mark.slow
def test_any_data_method_runs_on_images_by_name_or_from_a_folder(images: Path, capsys: Any) -> None:
    words = ["prune", "timm:test_resnet", "--num-classes", "10", "-m", "snip", "-s", "0.5", "--json"]
    for data in (str(images), str(images.parent), "digits"):
        if data == str(images.parent):
            images.rename(images.parent / "train")
        assert run([*words, "--data", data, "--batch-size", "4"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["sparsity"] == pytest.approx(0.5, abs=1e-5)
        assert report["num_classes"] == "10"


def test_a_pattern_by_its_numbers(file: str, capsys: Any) -> None:
    assert run(["prune", f"{file}:small", "-m", "magnitude", "--granularity", "2:4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5)


@pytest.mark.slow
def test_a_network_of_grey_images_gets_grey_images(images: Path, capsys: Any) -> None:
    words = ["prune", "zoo:conv2", "-m", "snip", "-s", "0.5", "--data", str(images), "--batch-size", "4"]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5, abs=1e-5)
