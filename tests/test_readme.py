"""The code in README.md and docs/ runs, in order, with small models in the place of large ones."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.cli import run

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md", "docs/use.md", "docs/tour.md", "docs/channels.md", "docs/compaction.md", "docs/files.md",
    "docs/pretrained.md", "docs/add_a_method.md", "docs/add_an_op.md", "docs/write_a_pass.md",
    "docs/production.md",
    "docs/sweeps.md", "docs/reports.md", "docs/index.md", "docs/deploy.md", "docs/concepts.md", "docs/faq.md",
    "docs/dpai.md", "docs/balance.md",
]  # fmt: skip
ELSEWHERE = {
    "docs/training.md": "tests/training/test_page.py",
    "docs/distributed.md": "tests/api/test_distributed_page.py",
}
"""Pages whose code another test runs. ``tests/test_site.py`` runs that of generated pages."""
SLOW = {"docs/balance.md", "docs/deploy.md"}
"""Pages that take ten seconds or more: a search of 2500 steps; exports, compaction and measuring."""
SMALL = {"resnet50": "test_resnet", "resnet18": "test_resnet", "224": "64"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def shrunk(code: str) -> str:
    for large, small in SMALL.items():
        code = code.replace(large, small)
    return code


@pytest.mark.every_case
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES]
)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if "fxprune.plot" in (ROOT / page).read_text(encoding="utf-8"):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = blocks(page, "python")
    assert found
    names: dict[str, Any] = {"__name__": "readme"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny networks collapse, and say so
        for index, block in enumerate(found):
            exec(compile(shrunk(block), f"{page}, block {index}", "exec"), names)
    assert capsys.readouterr().out or not any("print(" in block for block in found)


def test_no_page_has_code_that_does_not_run() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert sorted(page for page in pages if blocks(page, "python")) == sorted([*PAGES, *ELSEWHERE])
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "uv run fxprune prune timm:resnet18 --method magnitude --sparsity 0.9"
    assert f"pip install uv && {command}\n" in text
    assert "\nuv run pytest\n" in text
    assert "uv run --group all pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_first_command_installs_little_and_the_tests_need_no_more_words() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = re.search(r"^\[dependency-groups\]\n(.*?)\n\n", project, re.M | re.S)
    assert groups is not None
    assert 'dev = ["fxprune[test]"]' in groups[1].splitlines()
    assert re.search(r"^test = \[.*pytest.*xdist.*timeout", project, re.M)


def test_the_readme_fits_on_a_screen_and_the_next_page_has_all_names() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 75
    page = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    assert not [name for name in [*fxprune.__all__, *fxprune.list_methods()] if f"`{name}`" not in page]


def shown_are_printed(shown: str, printed: str) -> None:
    """Check that every line of a sample is printed, in that order, but for those left out by dots."""
    at = 0
    lines = [line.rstrip() for line in printed.splitlines()]
    for line in shown.splitlines():
        if line.strip() != "...":
            assert line.rstrip() in lines[at:], line
            at = lines.index(line.rstrip(), at) + 1


@pytest.mark.slow  # a resnet18 in full, 20 s
def test_the_numbers_of_the_first_pages_are_those_that_are_printed(capsys: Any) -> None:
    training, report = blocks("docs/use.md", "text")
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(blocks("README.md", "python")[0], "README.md", "exec"), names)
    shown_are_printed(report, capsys.readouterr().out)
    measured = blocks("README.md", "python")[1].partition("fxprune.export")[0]
    exec(compile(measured, "README.md", "exec"), names)
    for name, network in names["found"].networks.items():
        macs, size = f"{network.macs / 1e9:.2f} G", f"{network.file_bytes / 1e6:.1f} MB"
        assert f"| {name} | {macs} | {size} | " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert run(["prune", "timm:resnet18", "--method", "magnitude", "--sparsity", "0.9"]) == 0
    shown_are_printed(report, capsys.readouterr().out)
    assert "95.000% sparse" in training


@pytest.mark.parametrize("page", [*PAGES, "docs/distributed.md", "docs/vocabulary.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    generated = ("method/", "../method/")  # tests/test_site.py has these
    missing = [
        link
        for link in links
        if not link.startswith(generated) and not ((ROOT / page).parent / link).exists()
    ]
    assert not missing
