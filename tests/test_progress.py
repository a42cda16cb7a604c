"""Progress is a line a stage where nobody has a terminal, and nothing at all for what is quick."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import progress
from fxprune.progress import Display


def test_quick_work_says_nothing() -> None:
    file = io.StringIO()
    with Display(file=file).step("capture"):
        pass
    assert list(Display(file=file)(range(3), "rounds", 3)) == [0, 1, 2]
    assert file.getvalue() == ""


def test_slow_work_says_what_it_does_and_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    monkeypatch.setattr(progress, "PAUSE", 0.02)
    file = io.StringIO()
    with Display(file=file).step("capture"):
        time.sleep(0.1)
    for _ in Display(file=file)(range(4), "rounds", 4):
        time.sleep(0.06)
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["fxprune: capture", "fxprune: rounds: 4 steps"]
    assert lines[2].startswith("fxprune: rounds: 1 of 4, about ")
    assert lines[-1] == "fxprune: rounds: 4 of 4, about 0 s left"


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with Display(enabled=False).step("capture"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_one_step_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    file = io.StringIO()
    for _ in Display(file=file)(range(1), "rounds", 1):
        time.sleep(0.06)
    assert file.getvalue().splitlines()[0] == "fxprune: rounds: 1 step"


def test_a_word_for_yes_or_no_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^progress='no': expected True or False$"):
        fxprune.apply(nn.Linear(2, 2), "magnitude", 0.5, example_inputs=torch.ones(1, 2), progress="no")  # type: ignore


def test_compact_export_and_bench_say_that_they_are_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4)
    work: dict[str, Callable[..., object]] = {
        "compact": lambda **given: fxprune.compact(net, x, **given),
        "export": lambda **given: fxprune.export(net, tmp_path / "net.pt2", x, **given),
        "bench": lambda **given: fxprune.bench({"net": net}, x, seconds=0.01, **given),
    }
    for name, do in work.items():
        do()
        assert capsys.readouterr().err.startswith(f"fxprune: {name}")
        do(progress=False)
        assert capsys.readouterr().err == ""
        with pytest.raises(TypeError, match=rf"^{name} has no argument 'progres'; did you mean 'progress'"):
            do(progres=False)
