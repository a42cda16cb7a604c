"""The code in docs/training.md runs, in order."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parent.parent.parent / "docs" / "training.md"


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for index, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
            exec(compile(block, f"docs/training.md, block {index}", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["90.0%", "True"]
    after, of, before = lines[2].split()
    assert of == "of"
    assert int(after) <= 0.3 * int(before)
    assert lines[3] == "89.5%"
    assert lines[4].startswith("['0.0%: ")


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 4
    assert all((PAGE.parent / link).exists() for link in links)
