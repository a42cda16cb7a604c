"""Models by name, their weights from files or published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import fxprune
from fxprune.cli import run


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:squeezenet1_1"])
def test_models_by_name(model: str, capsys: Any) -> None:
    assert run(["analyze", model, "--resolution", "channel", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["density"] == 1.0
    assert report["effective_params"] == report["params"] > 1e6


def test_timm_models_are_those_of_timm(capsys: Any) -> None:
    assert run(["graph", "timm:resnet18.a1_in1k"]) == 0
    torch.manual_seed(0)
    names = dict(timm.create_model("resnet18").named_parameters())
    assert all(name in names for name in ("layer4.0.downsample.0.weight", "fc.weight"))
    assert "layer4.0.downsample.0" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_from_a_file(file: str, tmp_path: Path, capsys: Any) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    state = net.state_dict()
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=torch.ones(1, 6))
    wanted = fxprune.masks(pruned)
    save_file(state, tmp_path / "net.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "net.pth")
    fxprune.save(net, tmp_path / "own.safetensors")
    for name in ("net.safetensors", "net.pth", "own.safetensors"):
        out = tmp_path / f"out-{name}"
        words = ["-m", "magnitude", "-s", "0.5", "--weights", str(tmp_path / name), "--out", str(out)]
        assert run(["prune", f"{file}:small", *words]) == 0
        found = fxprune.load_masks(out / "model.safetensors")
        assert all(torch.equal(mask, wanted[key]) for key, mask in found.items())
        capsys.readouterr()
        assert run(["analyze", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kept_params"] == 80
    torch.save({key: value for key, value in state.items() if key != "2.bias"}, tmp_path / "part.pt")
    torch.save({**state, "0.weight": torch.ones(3, 3)}, tmp_path / "wrong.pt")
    for name, words in (("part.pt", "has no '2.bias'"), ("wrong.pt", "size mismatch for 0.weight")):
        assert run(["prune", f"{file}:small", "--weights", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_pretrained_tag_with_random_weights_says_so(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    create = timm.create_model

    def make(name: str, **sizes: Any) -> Any:
        asked.append(dict(sizes))
        sizes.pop("pretrained", None)
        return create(name, **sizes)

    monkeypatch.setattr(timm, "create_model", make)
    words = ["analyze", "timm:test_resnet.r160_in1k", "--json"]
    assert run(words) == 0
    assert "names published weights, but these are drawn at random; --pretrained" in capsys.readouterr().err
    assert run([*words, "--pretrained", "--num-classes", "7"]) == 0
    assert capsys.readouterr().err == ""
    assert asked == [{}, {"pretrained": True, "num_classes": 7}]
