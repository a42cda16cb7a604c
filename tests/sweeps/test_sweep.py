"""Every cell of a sweep is done once, by any number of processes, and after any kill."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli import run
from fxprune.sweeps import Results, read_results

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def train(model: nn.Module, seed: int) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return float((model(X).argmax(1) == Y).float().mean())


GRID: dict[str, Any] = {"methods": ["magnitude", "snip"], "sparsities": [0.5, 0.75], "seeds": [0, 1]}


@pytest.mark.slow
def test_every_cell_is_what_apply_and_training_give(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = fxprune.sweep(net, **GRID, train_fn=train, folder=tmp_path, data=(X, Y))
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row["method"], row["sparsity"], row["seed"]) for row in found.rows] == [
        cell
        for seed in (0, 1)
        for cell in [
            ("dense", 0.0, seed),
            *[(method, sparsity, seed) for sparsity in (0.5, 0.75) for method in ("magnitude", "snip")],
        ]
    ]
    row = found.rows[-1]
    torch.manual_seed(1)
    pruned = fxprune.apply(net(), "snip", 0.75, data=(X, Y), seed=1)
    report = fxprune.analyze(pruned)
    assert (row["kept"], row["nodes"], row["densities"]) == (
        report.kept_params, report.effective_nodes, report.layer_density
    )  # fmt: skip
    torch.manual_seed(1)
    assert row["accuracy"] == train(pruned, 1)
    mean = next(line for line in found.summary() if (line["method"], line["sparsity"]) == ("snip", 0.75))
    values = [row["accuracy"] for row in found.rows if (row["method"], row["sparsity"]) == ("snip", 0.75)]
    assert mean["accuracy"] == sum(values) / 2
    assert mean["accuracy ±"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (tmp_path / "table.md").read_text() == f"{found}\n"
    assert {row["method"] for row in read_results(tmp_path).rows} == {"dense", "magnitude", "snip"}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(model: nn.Module, seed: int) -> float:
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    wish = {**GRID, "train_fn": counted, "folder": tmp_path, "data": lambda seed: (X, Y)}
    with pytest.raises(KeyboardInterrupt):
        fxprune.sweep(net, **wish)
    assert not list((tmp_path / "cells").glob("*.claim"))
    assert len(fxprune.sweep(net, **wish).rows) == 10
    assert len(calls) == 11
    fxprune.sweep(net, **wish)
    assert len(calls) == 11


SCRIPT = """
import os, sys, time, torch, fxprune
from torch import nn
torch.set_num_threads(1)
def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
def train(model, seed):
    with open(sys.argv[1] + "/log", "a") as file:
        file.write(f"{os.getpid()} {seed}\\n")
    time.sleep(float(sys.argv[2]))
    return 0.5
fxprune.sweep(net, ["magnitude"], [0.5], range(6), train, folder=sys.argv[1], example_inputs=torch.ones(1, 6))
"""


def start(folder: Path, seconds: float) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(seconds)])


@pytest.mark.slow
def test_processes_divide_the_cells(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.5) for _ in range(2)]
    assert [process.wait(240) for process in processes] == [0, 0]
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(log) == 12
    assert len({line.split()[0] for line in log}) == 2
    assert len(read_results(tmp_path).rows) == 12


@pytest.mark.slow
def test_a_cell_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    victim = start(tmp_path, 600)
    deadline = time.monotonic() + 120
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    victim.kill()
    victim.wait()
    (held,) = (tmp_path / "cells").glob("*.claim")
    assert held.name.endswith(".0.claim")
    assert start(tmp_path, 0).wait(240) == 0
    assert len(read_results(tmp_path).rows) == 12
    assert all(row["accuracy"] == 0.5 for row in read_results(tmp_path).rows)


@pytest.mark.slow
def test_cells_that_fail_are_named_and_tried_again(tmp_path: Path) -> None:
    broken = [True]

    def failing(model: nn.Module, seed: int) -> float:
        if seed == 1 and broken[0]:
            raise RuntimeError("out of\nluck")
        return 1.0

    wish = {**GRID, "methods": ["magnitude"], "folder": tmp_path, "example_inputs": X, "train_fn": failing}
    with pytest.warns(UserWarning, match=r"sweep: .*-1 failed: out of luck"):
        found = fxprune.sweep(net, **wish)
    assert set(found.failed) == {"dense-0.0-1", "magnitude-0.5-1", "magnitude-0.75-1"}
    assert len(found.rows) == 3
    broken[0] = False
    assert not fxprune.sweep(net, **wish).failed


def test_folders_of_something_else(tmp_path: Path) -> None:
    wish: dict[str, Any] = {"sparsities": [0.5], "example_inputs": X, "progress": False}
    fxprune.sweep(net, {"m": ("magnitude", {})}, folder=tmp_path, **wish)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match=r"there 'm' is \['magnitude', .*take another label"):
        fxprune.sweep(net, {"m": ("random", {})}, folder=tmp_path, **wish)
    assert (tmp_path / "sweep.json").read_bytes() == before
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="results of format 99, this fxprune reads 1; nothing was changed"):
        fxprune.sweep(net, ["magnitude"], folder=tmp_path, **wish)
    with pytest.raises(FileNotFoundError, match="not a folder of a sweep"):
        read_results(tmp_path / "cells")
    with pytest.raises(ValueError, match="did you mean 'snip'"):
        fxprune.sweep(net, ["snipp"], folder=tmp_path / "new", **wish)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fxprune.sweep(lambda: 3, ["magnitude"], folder=tmp_path / "new", **wish)  # type: ignore[arg-type,return-value]


def one_layer(problem: Any) -> Any:
    """Keep weights of the first layer alone, so that there is no path."""
    masks = {name: torch.zeros_like(mask) for name, mask in problem.masks.items()}
    next(iter(masks.values())).view(-1)[: problem.budget.total] = True
    return masks


def test_a_network_that_is_cut_to_nothing_is_trained_and_has_no_milliseconds(tmp_path: Path) -> None:
    found = fxprune.sweep(
        net, [fxprune.Method("nothing", one_layer), "magnitude"], [0.75], folder=tmp_path,
        train_fn=lambda model, seed: 0.5, latency=True, example_inputs=torch.ones(1, 6), progress=False,
    )  # fmt: skip
    rows = {row["method"]: row for row in found.rows}
    assert not found.failed
    assert rows["nothing"]["milliseconds compact"] is None
    assert rows["nothing"]["parameters compact"] is None
    assert rows["nothing"]["accuracy"] == 0.5
    assert 0 < rows["magnitude"]["parameters compact"] < sum(p.numel() for p in net().parameters())
    assert rows["magnitude"]["milliseconds dense"] > 0


CONFIG = """
model = "zoo:lenet_300_100"
methods = ["magnitude", "small"]
sparsities = [0.9]
latency = true
[train]
epochs = 1
batch = 300
[options.small]
method = "magnitude"
budget = "erk"
"""


@pytest.mark.slow
def test_the_commands(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    config = tmp_path / "one.toml"
    config.write_text(CONFIG)
    assert run(["sweep", str(config), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("| method | sparsity | seeds | accuracy")
    rows = {row["method"]: row for row in read_results(tmp_path / "one").rows}
    assert set(rows) == {"dense", "magnitude", "small"}
    assert rows["magnitude"]["kept"] == rows["small"]["kept"]
    assert rows["magnitude"]["densities"] != rows["small"]["densities"]
    assert rows["small"]["milliseconds compact"] > 0
    assert run(["plot", str(tmp_path / "one"), "--out", str(tmp_path / "pictures")]) == 0
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {"accuracy.png", "nodes.png", "paths.png", "latency.png", "densities.png"}
    capsys.readouterr()
    for text, words in (
        ("modell = 1", "did you mean 'model'"),
        ('model = "zoo:conv2"', "'methods' is missing"),
        ("x = ", "not a TOML file"),
    ):
        config.write_text(text)
        assert run(["sweep", str(config)]) == 2
        assert words in capsys.readouterr().err
    assert run(["plot", str(tmp_path)]) == 2
    assert "not a folder of a sweep" in capsys.readouterr().err


def test_large_numbers_of_a_table_are_written_without_an_exponent() -> None:
    rows = [
        {"method": "a", "sparsity": 0.5, "seed": seed, "weights": weights}
        for seed, weights in enumerate((61700.0, 64300.0))
    ]
    assert "| 63000 ± 1838 |" in str(Results(rows))


def test_random_numbers_of_every_kind_follow_the_seed_of_a_cell(tmp_path: Path) -> None:
    """So a cell has the same result whichever process does it, and the caller's generators are as before."""

    def train(model: nn.Module, seed: int) -> dict[str, float]:
        return {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}

    def rows(folder: str, sparsities: list[float]) -> Any:
        before = random.getstate(), np.random.get_state()[1].tolist()
        found = fxprune.sweep(net, ["magnitude"], sparsities, seeds=[0, 1], train_fn=train,
                              folder=tmp_path / folder, example_inputs=torch.ones(1, 6))  # fmt: skip
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        keys = ("python", "numpy", "torch")
        return {(row["sparsity"], row["seed"]): [row[key] for key in keys] for row in found.rows}

    both, one = rows("both", [0.5, 0.9]), rows("one", [0.9])
    assert all(both[cell] == numbers for cell, numbers in one.items() if cell[0] == 0.9)
    assert both[0.9, 0] != both[0.9, 1]
