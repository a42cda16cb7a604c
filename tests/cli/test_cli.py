"""The command line: what it prints, writes and answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import one_in

import fxprune
from fxprune import methods
from fxprune.cli import run


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


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", one_in(4, methods.names()))
def test_the_help_of_a_method_has_its_options_and_those_of_no_other(
    method: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    every = {option for name in methods.names() for option in methods.options(name)}
    assert run(["prune", "--method", method, "--help"]) == 0
    text = capsys.readouterr().out
    shown = {option for option in every if re.search(rf"--{option.replace('_', '-')}[/ ]", text)}
    assert shown - {"weights"} == set(methods.options(method)) - {"weights"}


def test_the_help_of_a_training_method_has_its_options(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["train", "-m", "gmp", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--initial" in text
    assert "--gamma" not in text


@pytest.mark.slow
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
    (["analyze", "nowhere"], "no folder of that name, and no model; expected timm:NAME"),
    (["bench", "no/where"], "there is no such folder; expected a folder that prune --out wrote"),
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
    (["sweep", "none.toml"], "CONFIG none.toml: there is no such file"),
    (["prune", "--config"], "expected a file such as run.toml"),
    (["prune", "--config", "FILE"], "not a TOML file"),
    (["analyze", "nowhere/"], "there is no such folder; expected a folder that prune --out wrote"),
    (["analyze", "x.pt"], "a file of weights, which holds no network"),
    (["prune", "no/such/file.py:net"], "there is no file"),
    (["prune", "FILE:nothing"], "defines no function 'nothing'"),
    (["prune", "FILE:wrong"], "returned an object of type int"),
    (["prune", "FILE:failing"], "factories.py, line 19: KeyError: 'weights'; mend the file"),
    (
        ["prune", "FILE:asking"],
        "factories.py: TypeError: asking() missing 1 required positional argument: 'width'",
    ),
    (["prune", "FOLDER/broken.py:net"], "broken.py, line 2: SyntaxError"),
    (
        ["prune", "FOLDER/lacking.py:net"],
        "lacking.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
    ),
    (["prune", "FILE:small", "-m", "snip", "--data", "FILE:failing"], "line 19: KeyError: 'weights'"),
    (["prune", "FILE:small", "--plan", "none.json"], "--plan none.json: there is no such file"),
    (
        ["plan", "FILE:small", "--out", "nowhere/plan.json"],
        "--out nowhere/plan.json: there is no folder nowhere",
    ),
    (["plan", "FILE:small", "--plot", "nowhere/plan.png"], "--plot nowhere/plan.png: there is no folder"),
    (["train", "FILE:small", "--plot", "nowhere/a.png"], "--plot nowhere/a.png: there is no folder nowhere"),
    (["plan", "FILE:small", "--out", "FOLDER"], "this is a folder; expected the name of a file"),
    (["prune", "FILE:bare"], "let the factory return a pair of it and example inputs"),
    (["prune", "FILE:small", "--sparsity", "1.5"], "sparsity=1.5"),
    (["prune", "FILE:small", "--sparsity", "much"], "--sparsity"),
    (["prune", "FILE:small", "--method", "synflo"], "did you mean 'synflow'"),
    (["prune", "FILE:small", "--method", "snip"], "needs --data: cifar10, cifar100, digits"),
    (["prune", "FILE:small", "--rounds", "few"], "rounds='few'"),
    (["prune", "FILE:small", "--resolution", "pixel"], "resolution='pixel'"),
    (["prune", "FILE:small", "-m", "magnitude", "--rounds", "3"], "no option 'rounds'"),
    (["prune", "FILE:small", "--bogus", "3"], "--bogus"),
    (["prune", "FILE:small", "--budget", "fc=0.5"], "'fc' fits no prunable layer"),
    (["prune", "FILE:small", "--budget", "0=half"], "expected layer=sparsity"),
    (["prune", "FILE:small", "--budget", "=0.5"], "--budget =0.5: expected layer=sparsity; '=0.5' names no"),
    (["prune", "FILE:small", "--granularity", "row"], "granularity='row'"),
    (["prune", "FILE:small", "--exclude", "0", "2"], "once for each, as in --exclude A --exclude B"),
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
    (["export", "FILE:small", "net.bin"], "expected a name that ends in .onnx or .pt2"),
    (["export", "FILE:small", "nowhere/net.pt2"], "OUT nowhere/net.pt2: there is no folder nowhere"),
    (["export", "FILE:small", "net.pt2", "--form", "dense"], "is no folder that prune wrote"),
    (["export", "FOLDER", "net.pt2"], "no such fxprune file"),
    (
        ["prune", "FILE:small", "-m", "magnitude", "--out", "/proc/new"],
        "--out /proc/new: nothing can be written",
    ),
    (
        ["prune", "zoo:conv2", "-m", "snip", "--data", "FOLDER/none"],
        "expected a folder of images for each class",
    ),
    (
        ["prune", "FILE:small", "--weights", "FOLDER/broken.py"],
        "not a file of weights (Weights only load failed)",
    ),
    (["sweep", "FOLDER/a.toml"], "[train] has no 'epoch'; did you mean 'epochs'?"),
    (["sweep", "FOLDER/b.toml"], "[options] has no 'magnitud'; did you mean 'magnitude'?"),
    (["sweep", "FOLDER/c.toml"], "train=3: expected a table, [train]"),
    (
        ["sweep", "FOLDER/d.toml"],
        "it has 2 outputs, and the data 10 classes; let its factory return one with 10",
    ),
    (["graph", "timm:nothing_like_it"], "timm has no model of that name"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_bad_argument_is_one_line_and_exit_code_2(
    words: list[str], message: str, file: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "broken.py").write_text("import torch\ndef net(:")
    (tmp_path / "lacking.py").write_text("import nowhere")
    (tmp_path / "none").mkdir()
    grid = f"model='{file}:few'\nmethods='magnitude'\nsparsities=0.5\n"
    (tmp_path / "a.toml").write_text(grid + "[train]\nepoch=1")
    (tmp_path / "b.toml").write_text(grid + "[options.magnitud]\nbudget='erk'")
    (tmp_path / "c.toml").write_text(grid + "train=3")
    (tmp_path / "d.toml").write_text(grid)
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


@pytest.mark.slow
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
    Path(file).write_text(
        Path(file).read_text() + "\ndef one():\n    return nn.Linear(6, 4), torch.ones(2, 6)\n"
    )
    fxprune.save(net, tmp_path / "masks.safetensors", form="masks", **shape)
    assert run(["analyze", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_params"] == 12


def test_it_says_which_version_it_is(capsys: Any) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fxprune {fxprune.__version__}\n"


@pytest.mark.thinned(3)
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
