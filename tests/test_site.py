"""The site: generated pages say of a method what it says itself, their code runs, and mkdocs builds it."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import one_in

import fxprune
from fxprune import methods
from fxprune.papers import papers_of
from fxprune.training.methods import METHODS

ROOT = Path(__file__).parent.parent


def load_builder(name: str = "build_site") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()
PAGES: dict[str, str] = BUILDER.pages()
NAMES = sorted([*methods.names(), *METHODS])


def test_every_method_has_a_page() -> None:
    listed = [name for names in BUILDER.KINDS.values() for name in names]
    assert sorted(listed) == NAMES
    assert all(f"({name}.md)" in PAGES["method/index.md"] for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_all_of_its_method(name: str) -> None:
    page = PAGES[f"method/{name}.md"]
    for row in ("| needs | ", "| cost | ", "| when | "):
        assert page.count(row) == 1
    for paper in papers_of(name):
        assert f"{{{paper.key}," in page
    if name in methods.names():
        for option in methods.options(name).values():
            assert re.search(rf"^\| `{option.name}` \| `.*` \| .+ \|$", page, re.M), option.name
    # Cost, use and options are shown once, and what a reader of the docstring sees is all there.
    prose = page.partition("## Options")[0]
    assert not re.search(r"^(Cost|When|Options):|^>>>", prose, re.M)
    assert len(prose) > 300


def test_times_are_those_that_were_measured() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| snip \|.*\| ([\d.]+) \|$", text, re.M)
    assert f"{first[0]} s on resnet20, {first[3]} s on vit" in PAGES["method/snip.md"]
    assert "measured" not in PAGES["method/wanda.md"].partition("## Options")[0].partition("|---|")[2][:200]


@pytest.mark.parametrize("name", one_in(3, NAMES))
def test_code_on_a_generated_page_runs(name: str, capsys: Any) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES[f"method/{name}.md"], re.M | re.S)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny networks collapse, and say so
        exec(compile(block, name, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


def test_the_reference_has_every_public_name() -> None:
    headings = re.findall(r'heading: "(\w+)"', PAGES["reference.md"])
    assert headings == fxprune.__all__


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    to_markdown = load_builder("docstrings").to_markdown
    text = "Add. As :func:`f`.\n\nExample:\n    >>> 1\n    1\n\n>>> [[2]]\n[[2]]\n\nEnd."
    assert to_markdown(text) == (
        "Add. As `f`.\n\nExamples:\n    >>> 1\n    1\n\n```pycon\n>>> [[2]]\n[[2]]\n```\n\nEnd."
    )


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w]+\.md", config.partition("\nnav:")[2]))
    assert named - {"reference.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow  # the whole site, half a minute
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    for name in fxprune.__all__:
        thing = getattr(fxprune, name)
        assert f'id="{thing.__module__}.{thing.__qualname__}"' in reference
    assert ":func:" not in reference
