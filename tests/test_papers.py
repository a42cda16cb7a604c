"""The table of papers: every method is in it, and its entries agree with the methods and with CITATION.cff.

``REGENERATE=1 pytest tests/test_papers.py`` writes the references of CITATION.cff anew; read the diff.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune import methods
from fxprune.cli import run
from fxprune.papers import PAPERS, Paper, bibtex, citable, papers_of
from fxprune.training.methods import METHODS

ROOT = Path(__file__).parent.parent
CITATION = ROOT / "CITATION.cff"
ARXIV = re.compile(r"\d{4}\.\d{5}")


def described() -> dict[str, str]:
    """Each method's own words on its papers: its docstring and its line in the list."""
    found = {}
    for name in methods.names():
        module = name.replace("-", "_")
        factory = getattr(__import__(f"fxprune.methods.{module}", fromlist=[module]), module)
        found[name] = f"{methods.get(name).paper} {factory.__doc__}"
    return found | {name: str(factory.__doc__) for name, factory in METHODS.items()}


def families(paper: Paper) -> list[str]:
    return [author.partition(",")[0] for author in paper.authors.split(" and ")]


def plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def test_every_method_has_a_paper_and_every_paper_a_method() -> None:
    assert citable() == sorted([*methods.names(), *METHODS])
    assert all(paper.methods for paper in PAPERS)
    assert len({paper.key for paper in PAPERS}) == len(PAPERS)


@pytest.mark.parametrize("name", sorted([*methods.names(), *METHODS]))
def test_papers_are_those_that_the_method_names(name: str) -> None:
    words = described()[name]
    found = papers_of(name)
    numbers = {paper.arxiv for paper in found}
    # The first one that a docstring names is the method's own; others may be named in passing.
    assert not ARXIV.search(words) or ARXIV.findall(words)[0] in numbers
    names = [family for paper in found for family in families(paper)]
    assert any(plain(family) in plain(words) for family in names) or name in ("npb-synflow", "magnitude")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.key)
def test_entries_are_complete(paper: Paper) -> None:
    assert paper.kind in ("inproceedings", "article", "misc", "software")
    assert bool(paper.venue) == (paper.kind in ("inproceedings", "article"))
    assert paper.venue or paper.arxiv or paper.url or paper.note
    assert not paper.arxiv or ARXIV.fullmatch(paper.arxiv)
    if not paper.authors.startswith("{"):
        first = plain(families(paper)[0]).replace(" ", "")
        assert re.fullmatch(rf"{first}{paper.year}[a-z]+", paper.key)
        assert all(re.fullmatch(r"[^,]+, [^,]+", author) for author in paper.authors.split(" and "))
    entry = bibtex([paper])
    assert entry.count("{") == entry.count("}")
    assert entry.startswith(f"@{paper.kind}{{{paper.key},\n")
    if paper.arxiv:  # the number of a preprint tells its month, and a paper is no older
        assert 2000 + int(paper.arxiv[:2]) <= paper.year


def test_the_command_prints_them(capsys: Any) -> None:
    assert run(["methods", "--cite", "iter-snip"]) == 0
    printed = capsys.readouterr().out
    assert printed == bibtex(papers_of("iter-snip")) + "\n"
    assert re.findall(r"^@\w+\{(\w+),$", printed, re.M) == ["dejorge2021progressive", "verdenius2020pruning"]
    assert run(["methods", "--cite", "synflw"]) != 0
    assert "--cite synflw: no such method; did you mean synflow" in capsys.readouterr().err
    assert run(["methods", "--cite", "zzz"]) != 0
    assert f"there are {', '.join(citable())}" in capsys.readouterr().err


def reference(paper: Paper) -> str:
    """A reference of CITATION.cff."""
    kinds = {"inproceedings": "conference-paper", "misc": "unpublished"}
    lines = [f"  - type: {kinds.get(paper.kind, paper.kind)}", f'    title: "{paper.title}"', "    authors:"]
    for author in paper.authors.split(" and "):
        family, _, given = author.partition(", ")
        if given:
            lines += [f'      - family-names: "{family}"', f'        given-names: "{given}"']
        else:
            lines += ['      - name: "' + author.strip("{}") + '"']
    lines.append(f"    year: {paper.year}")
    if paper.kind == "inproceedings":
        lines += ["    collection-title: " + f'"{paper.venue}"']
    if paper.kind == "article":
        lines += [f'    journal: "{paper.venue}"']
    if paper.arxiv:
        lines.append(f'    url: "https://arxiv.org/abs/{paper.arxiv}"')
    elif paper.url:
        lines.append(f'    url: "{paper.url}"')
    return "\n".join(lines)


def test_citation_file_has_the_table() -> None:
    text = CITATION.read_text(encoding="utf-8")
    head = text.partition("references:\n")[0]
    wanted = head + "references:\n" + "\n".join(map(reference, PAPERS)) + "\n"
    wanted = wanted.replace(reference(papers_of("balance")[-1]) + "\n", "")  # the file is about this one
    if os.environ.get("REGENERATE"):
        CITATION.write_text(wanted, encoding="utf-8")
    assert text == wanted


def test_citation_file_is_yaml_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
    assert found["version"] == fxprune.__version__
    assert found["title"] in papers_of("balance")[-1].title
    assert len(found["references"]) == len(PAPERS) - 1
