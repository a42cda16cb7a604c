"""The code in README.md and docs/ runs, in order, with small models in the place of large ones."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md", "docs/tour.md", "docs/channels.md", "docs/compaction.md", "docs/files.md",
    "docs/pretrained.md", "docs/add_a_method.md", "docs/add_an_op.md", "docs/write_a_pass.md",
]  # fmt: skip
SMALL = {"resnet50": "test_resnet", "resnet18": "test_resnet", "224": "64"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def shrunk(code: str) -> str:
    for large, small in SMALL.items():
        code = code.replace(large, small)
    return code


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = blocks(page, "python")
    assert found
    names: dict[str, Any] = {"torch": torch, "__name__": "readme"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny networks collapse, and say so
        for index, block in enumerate(found):
            exec(compile(shrunk(block), f"{page}, block {index}", "exec"), names)
    assert capsys.readouterr().out


def test_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "uv run fxprune prune timm:resnet50 --method synflow --sparsity 0.9 --compact --out pruned/"
    assert f"pip install uv && {command}" in text
    assert "\nuv run pytest\n" in text
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, "docs/distributed.md", "docs/vocabulary.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing
