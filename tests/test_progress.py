"""Progress is a line a stage where nobody has a terminal, and nothing at all for what is quick."""

import io
import time
from typing import Any

import pytest

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
