"""The command line: what it prints, writes and answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import fxprune
from fxprune import methods
from fxprune.cli import channel_flags, run
from fxprune.sparsity.granularity import CHANNEL_OPTIONS

FACTORIES = """
import torch
from torch import nn

def small():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return net, torch.ones(2, 6)

def bare():
    return small()[0]

def wrong():
    return 3

def failing():
    return {}["weights"]

def asking(width):
    return nn.Linear(width, 4)

def data():
    return torch.randn(8, 6), torch.arange(8) % 4
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


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


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:squeezenet1_1"])
def test_models_by_name(model: str, capsys: Any) -> None:
    assert run(["analyze", model, "--resolution", "channel", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["density"] == 1.0
    assert report["effective_params"] == report["params"] > 1e6


def test_graph(file: str, capsys: Any) -> None:
    assert run(["graph", f"{file}:small"]) == 0
    assert "0.weight" in capsys.readouterr().out


def test_methods_are_listed(capsys: Any) -> None:
    assert run(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in fxprune.list_methods())
    assert run(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == fxprune.list_methods()
    assert rows["synflow"]["options"]["rounds"] == 100
    assert rows["snip"]["needs"] == ["data"]


def test_the_help_of_a_method_has_its_options_and_those_of_no_other(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    every = {option for method in methods.names() for option in methods.options(method)}
    for method in methods.names():
        assert run(["prune", "--method", method, "--help"]) == 0
        text = capsys.readouterr().out
        shown = {option for option in every if re.search(rf"--{option.replace('_', '-')}[/ ]", text)}
        assert shown - {"weights"} == set(methods.options(method)) - {"weights"}
    assert run(["train", "-m", "gmp", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--initial" in text
    assert "--gamma" not in text


def test_warnings_are_single_lines(file: str, capsys: Any) -> None:
    assert run(["prune", f"{file}:small", "-m", "random", "-s", "0.98"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("fxprune: warning: layer collapse")
    assert run(["prune", f"{file}:small", "-m", "random", "-s", "0.98", "--on-collapse", "raise"]) == 1
    assert capsys.readouterr().err.startswith("fxprune: error: layer collapse")
    assert run(["prune", f"{file}:small", "-m", "random", "-s", "0.98", "--on-collapse", "repair"]) == 0
    assert capsys.readouterr().err == ""


BAD = [
    (["frobnicate"], "frobnicate"),
    (["prune"], "MODEL"),
    (["prune", "timm:resnet5O"], "did you mean resnet50"),
    (["prune", "torchvision:resnet17"], "did you mean resnet18"),
    (["prune", "resnet18"], "expected timm:NAME, torchvision:NAME, zoo:NAME, hf:FOLDER or path"),
    (["prune", "zoo:alexnet"], "the zoo has conv2"),
    (["prune", "FILE"], "factories.py:factory, a function in it"),
    (["prune", "FILE:small", "-m", "relative"], "is unknown; there are alps,"),
    (["prune", "FILE:small", "-m", "gmp"], "fxprune train --method gmp"),
    (["prune", "FILE:small", "-s", "90"], "0.9?"),
    (["prune", "FILE:small", "--pretrained"], "has no published weights"),
    (["prune", "FILE:small", "--num-classes", "3"], "has no argument num_classes"),
    (["prune", "FILE:small", "--weights", "none.pt"], "--weights none.pt: there is no such file"),
    (["prune", "FILE:small", "--weights", "FILE"], "not a file of weights"),
    (
        ["prune", "FILE:small", "-m", "snip", "--data", "digits"],
        "the network takes (2, 6), not square images",
    ),
    (["prune", "zoo:resnet20", "-m", "snip", "--data", "mnist"], "expected cifar10, cifar100, digits"),
    (["prune", "zoo:resnet20", "-m", "snip", "--data", "cifar10"], "cifar-10-batches-py"),
    (["prune", "zoo:resnet20", "-m", "snip", "--data", "fashion-mnist"], "train-images-idx3-ubyte"),
    (["prune", "FILE:small", "--threads", "0"], "--threads 0"),
    (["prune", "--config", "none.toml"], "--config none.toml: there is no such file"),
    (["prune", "--config"], "expected a file such as run.toml"),
    (["prune", "--config", "FILE"], "not a TOML file"),
    (["analyze", "nowhere/"], "there is no such folder; expected a folder that prune --out wrote"),
    (["analyze", "x.pt"], "a file of weights, which holds no network"),
    (["prune", "no/such/file.py:net"], "there is no file"),
    (["prune", "FILE:nothing"], "defines no function 'nothing'"),
    (["prune", "FILE:wrong"], "returned a int"),
    (["prune", "FILE:failing"], "factories.py, line 16: KeyError: 'weights'; mend the file"),
    (
        ["prune", "FILE:asking"],
        "factories.py: TypeError: asking() missing 1 required positional argument: 'width'",
    ),
    (["prune", "FOLDER/broken.py:net"], "broken.py, line 2: SyntaxError"),
    (
        ["prune", "FOLDER/lacking.py:net"],
        "lacking.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
    ),
    (["prune", "FILE:small", "-m", "snip", "--data", "FILE:failing"], "line 16: KeyError: 'weights'"),
    (["prune", "FILE:small", "--plan", "none.json"], "--plan none.json: there is no such file"),
    (
        ["plan", "FILE:small", "--out", "nowhere/plan.json"],
        "--out nowhere/plan.json: there is no folder nowhere",
    ),
    (["plan", "FILE:small", "--plot", "nowhere/plan.png"], "--plot nowhere/plan.png: there is no folder"),
    (["train", "FILE:small", "--plot", "nowhere/a.png"], "--plot nowhere/a.png: there is no folder nowhere"),
    (["plan", "FILE:small", "--out", "FOLDER"], "this is a folder; expected the name of a file"),
    (["prune", "FILE:bare"], "example_inputs"),
    (["prune", "FILE:small", "--sparsity", "1.5"], "sparsity=1.5"),
    (["prune", "FILE:small", "--sparsity", "much"], "--sparsity"),
    (["prune", "FILE:small", "--method", "synflo"], "did you mean 'synflow'"),
    (["prune", "FILE:small", "--method", "snip"], "needs data="),
    (["prune", "FILE:small", "--rounds", "few"], "rounds='few'"),
    (["prune", "FILE:small", "--resolution", "pixel"], "resolution='pixel'"),
    (["prune", "FILE:small", "-m", "magnitude", "--rounds", "3"], "no option 'rounds'"),
    (["prune", "FILE:small", "--bogus", "3"], "--bogus"),
    (["prune", "FILE:small", "--budget", "fc=0.5"], "'fc' fits no prunable layer"),
    (["prune", "FILE:small", "--budget", "0=half"], "expected layer=sparsity"),
    (["prune", "FILE:small", "--granularity", "row"], "granularity='row'"),
    (["prune", "FILE:small", "--exclude", "fc"], "exclude: 'fc'"),
    (["prune", "FILE:small", "--device", "gpu"], "device='gpu'"),
    (["prune", "FILE:small", "--out", "FILE"], "there is a file of that name"),
    (["analyze", "FILE:small", "--resolution", "pixel"], "--resolution pixel"),
    (["analyze", "FOLDER"], "no such fxprune file"),
    (["prune", "FILE:small", "--export", "net.bin"], "expected a name that ends in .onnx or .pt2"),
    (["prune", "FILE:small", "--export", "nowhere/net.pt2"], "there is no folder nowhere"),
    (["bench", "FILE:small", "--runtime", "tpu"], "runtimes: 'tpu' is unknown"),
    (["bench", "FILE:small", "--batch", "0"], "batch: 0 is no batch size"),
    (["bench", "FOLDER"], "no such fxprune file"),
    (["graph", "timm:nothing_like_it"], "timm has no model of that name"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_bad_argument_is_one_line_and_exit_code_2(
    words: list[str], message: str, file: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "broken.py").write_text("import torch\ndef net(:")
    (tmp_path / "lacking.py").write_text("import nowhere")
    words = [word.replace("FILE", file).replace("FOLDER", str(tmp_path)) for word in words]
    assert run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_without_words_it_shows_its_commands(capsys: Any) -> None:
    assert run([]) == 0
    assert "prune" in capsys.readouterr().out


@pytest.mark.slow
def test_as_a_process() -> None:
    command = [sys.executable, "-m", "fxprune", "prune", "timm:resnet18", "-s", "2"]
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2
    assert [line[:15] for line in bad.stderr.splitlines() if "load" not in line] == ["fxprune: error:"]


def test_timm_models_are_those_of_timm(capsys: Any) -> None:
    assert run(["graph", "timm:resnet18.a1_in1k"]) == 0
    torch.manual_seed(0)
    names = dict(timm.create_model("resnet18").named_parameters())
    assert all(name in names for name in ("layer4.0.downsample.0.weight", "fc.weight"))
    assert "layer4.0.downsample.0" in capsys.readouterr().out


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


def test_bench_of_a_model_and_of_a_folder(file: str, tmp_path: Path, capsys: Any) -> None:
    short = ["--seconds", "0.001", "--threads", "1"]
    assert run(["bench", f"{file}:small", "--batch", "1", "3", "--runtime", "eager", *short, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows["networks"]) == ["dense", "masked", "compact"]
    assert [row["batch"] for row in rows["timings"]] == [1, 1, 1, 3, 3, 3]
    out = str(tmp_path / "out")
    assert run(["prune", f"{file}:small", "-m", "magnitude", "-s", "0.5", "--out", out]) == 0
    capsys.readouterr()
    assert run(["bench", out, *short]) == 0
    printed = capsys.readouterr().out
    assert "x as fast as dense" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["dense", "masked", "compact"]


def test_folders_with_masks_alone_can_still_be_read(file: str, tmp_path: Path, capsys: Any) -> None:
    net = fxprune.apply(torch.nn.Linear(6, 4), "magnitude", 0.5, example_inputs=torch.ones(1, 6))
    shape = {"model": f"{file}:one", "method": "magnitude", "seed": 0}
    Path(file).write_text(FACTORIES + "\ndef one():\n    return nn.Linear(6, 4), torch.ones(2, 6)\n")
    fxprune.save(net, tmp_path / "masks.safetensors", form="masks", **shape)
    assert run(["analyze", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_params"] == 12


def test_every_option_of_channels_has_a_flag() -> None:
    assert tuple(channel_flags.HELP) == CHANNEL_OPTIONS


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a folder of images for each class."""
    folder = tmp_path / "images"
    for label in ("bird", "cat"):
        (folder / label).mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((40, 30), 64 + index).convert("RGB").save(folder / label / f"{index}.png")
    return folder


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


def test_a_file_of_flags(file: str, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{file}:small"\nmethod = "snip"\ndata = "{file}:data"\nsparsity = 0.25\nexclude = ["2"]\n'
        'mode = "eval"\njson = true\n'
    )
    assert run(["prune", "--config", str(config)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["options"]) == ("snip", {"mode": "eval"})
    assert [layer["kept_params"] for layer in report["layers"].values()] == [72, 64]
    assert run(["prune", f"--config={config}", "-s", "0.5", "-m", "random", "--mode", "eval"]) == 2
    assert "no option 'mode'" in capsys.readouterr().err
    config.write_text('modell = "x"\n')
    assert run(["prune", "--config", str(config)]) == 2
    assert "'modell' is no flag of this command; did you mean 'model'?" in capsys.readouterr().err


def test_it_says_which_version_it_is(capsys: Any) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fxprune {fxprune.__version__}\n"


def test_a_pattern_by_its_numbers(file: str, capsys: Any) -> None:
    assert run(["prune", f"{file}:small", "-m", "magnitude", "--granularity", "2:4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fxprune pru", {"prune"}),
        ("fxprune prune --method sn", {"snip"}),
        ("fxprune prune --thr", {"--threads"}),
    ],
)
def test_a_shell_can_complete(words: str, expected: set[str]) -> None:
    count = str(len(words.split()) - 1)
    found = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'fxprune'; from fxprune.cli import main; main()"],
        env={**os.environ, "_FXPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count},
        capture_output=True,
        text=True,
    )
    assert set(found.stdout.split()) == expected
