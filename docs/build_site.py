"""Generate the pages of the site that the package says itself: one per method, and the reference.

A hook of mkdocs (``mkdocs.yml``). A method's page is its docstring, the options of its signature, the time in
``docs/methods.md`` and the entries of ``fxprune.papers``; nothing on it is written by hand.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import fxprune
from fxprune import methods
from fxprune.methods import Option
from fxprune.option_notes import option_notes
from fxprune.papers import bibtex, papers_of
from fxprune.training.methods import METHODS

PAGES = Path(__file__).parent
SOURCE = "https://github.com/fxprune/fxprune/blob/main/"
KINDS = {
    "Without data or weights": ("random", "dpai", "npb", "balance"),
    "From the weights": (
        "magnitude", "lamp", "synflow", "synflow-l2", "logsynflow", "npb-synflow", "phew", "ntk-sap",
    ),
    "From data, at initialization": ("snip", "iter-snip", "force", "grasp", "grasp-it", "px", "prospr"),
    "From data, on trained networks": ("taylor", "obd", "wanda", "dsnot", "sparsegpt", "alps", "obc"),
    "Channels": ("group-norm", "fpgm", "bn-scale"),
    "While training": ("asni", "gmp", "imp", "rigl", "set"),
}  # fmt: skip
"""Sections of the list of methods; a test demands that every method is in one."""

NET = """\
import torch
import fxprune
from torch import nn

net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
"""


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    listed = [{title: [f"method/{name}.md" for name in names]} for title, names in KINDS.items()]
    for section in config.nav:
        if "Methods" in section:
            section["Methods"] = ["method/index.md", *listed]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of the folder."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to files outside of the folder lead to the repository."""
    return re.sub(r"\]\(\.\./(?=[A-Z]|examples|benchmarks|fxprune|tests)", f"]({SOURCE}", markdown)


def pages() -> dict[str, str]:
    """Return the generated pages, by their address."""
    named = [name for names in KINDS.values() for name in names]
    return {
        "method/index.md": index(),
        "reference.md": reference(),
        **{f"method/{name}.md": method_page(name) for name in named},
    }


def factory(name: str) -> Any:
    """Return the function that makes the method called ``name``."""
    if name in METHODS:
        return METHODS[name]
    module = name.replace("-", "_")
    return getattr(__import__(f"fxprune.methods.{module}", fromlist=[module]), module)


def read_docstring(name: str) -> tuple[str, str, dict[str, str]]:
    """Return the first line of a method's docstring, its other paragraphs, and its cost and use."""
    text = inspect.getdoc(factory(name)) or ""
    title, _, rest = text.partition("\n\n")
    facts = {
        word: " ".join(found[1].split())
        for word in ("Cost", "When")
        if (found := re.search(rf"^{word}: (.+(?:\n    .+)*)", rest, re.M))
    }
    rest = re.sub(r"^(?:Cost|When): .+(?:\n    .+)*\n?", "", rest, flags=re.M)
    rest = re.sub(r"^Options:\n(?:    .*\n?)*", "", rest, flags=re.M)
    rest = re.sub(r"^>>> (?:.|\n)*", "", rest, flags=re.M)
    return " ".join(title.split()), re.sub(r"\n{3,}", "\n\n", rest).strip(), facts


def method_page(name: str) -> str:
    """Write the page of one method."""
    title, text, facts = read_docstring(name)
    parts = [f"# {name}", "", title, "", f"| needs | {needs(name)} |", "|---|---|"]
    parts += [f"| {word.lower()} | {facts[word]} |" for word in facts]
    if name in (times := measured()):
        parts.append(f"| measured | {times[name]} ([all methods compared](../methods.md)) |")
    parts += ["", text.replace("docs/", "../"), "", "## Options", "", options_table(name), "", "## Use", ""]
    parts += ["```python", NET + usage(name).strip(), "```", "", "## Cite", ""]
    parts += ["```bibtex", bibtex(papers_of(name)), "```", ""]
    return "\n".join(parts)


def needs(name: str) -> str:
    """Say what a method looks at."""
    if name in METHODS:
        return "a training loop"
    return "data" if "data" in methods.get(name).needs else "no data"


def measured() -> dict[str, str]:
    """Return the seconds of each method that the tables of ``methods.md`` have at 90 %, by network."""
    text = (PAGES / "methods.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for network, section in re.findall(r"^## (resnet20|vit)\n(.*?)(?=^## )", text, re.M | re.S):
        table = section.partition("### 90 % removed")[2].partition("###")[0]
        for row in re.findall(r"^\| ([\w-]+) \|.* ([\d.]+) \|$", table, re.M):
            found.setdefault(row[0], []).append(f"{row[1]} s on {network}")
    return {name: ", ".join(times) + ", 90 %" for name, times in found.items()}


def options_table(name: str) -> str:
    """Write the options of a method's signature as a table."""
    if name in METHODS:
        notes = option_notes(inspect.getdoc(factory(name)) or "")
        parameters = inspect.signature(factory(name)).parameters.values()
        rows = [
            (word.name, repr(word.default), notes.get(word.name, ""))
            for word in parameters
            if word.kind is inspect.Parameter.KEYWORD_ONLY
        ]
    else:
        rows = [(word.name, repr(word.default), _help(word)) for word in methods.options(name).values()]
    if not rows:
        return "None of its own."
    rows = [(option, default, note.replace("|", "\\|")) for option, default, note in rows]
    lines = [f"| `{option}` | `{default}` | {note} |" for option, default, note in rows]
    return "\n".join(["| option | default | |", "|---|---|---|", *lines])


def _help(option: Option) -> str:
    choices = ", ".join(f"`{choice!r}`" for choice in option.choices)
    return option.help + (f" (one of {choices})" if choices else "")


def usage(name: str) -> str:
    """Write how a method is called, on a small network."""
    if name == "imp":
        return 'pruner = fxprune.Pruner(net, "imp", total=3, example_inputs=x)\nprint(pruner.step(1))\n'
    if name in METHODS:
        lines = [f'pruner = fxprune.Pruner(net, "{name}", 0.9, total=10, example_inputs=x)']
        loss = ", loss=lambda: nn.functional.cross_entropy(pruner.model(x), y)" if name == "rigl" else ""
        lines += ["for epoch in range(1, 11):", f"    pruner.step(epoch{loss})"]
        return "\n".join([*lines, "print(pruner.sparsity)", ""])
    words = ['granularity="channel"'] if name in KINDS["Channels"] else []
    words.append("data=(x, y)" if "data" in methods.get(name).needs else "example_inputs=x")
    return f'pruned = fxprune.apply(net, "{name}", 0.5, {", ".join(words)})\nprint(fxprune.analyze(pruned))\n'


def index() -> str:
    """Write the list of all methods."""
    parts = [
        "# Methods",
        "",
        "Each page is made from the method's own docstring, its signature and one table of",
    ]
    parts += ["papers; `fxprune methods` prints the list, `fxprune methods --cite NAME` BibTeX.", ""]
    for title, names in KINDS.items():
        parts += [f"## {title}", "", "| | needs | when |", "|---|---|---|"]
        for name in names:
            when = read_docstring(name)[2]["When"]
            parts.append(f"| [{name}]({name}.md) | {needs(name)} | {when} |")
        parts.append("")
    return "\n".join(parts)


def reference() -> str:
    """Write the page on every public name; mkdocstrings reads the docstrings."""
    parts = ["# Reference", "", "Every name of `fxprune.__all__`.", ""]
    for name in fxprune.__all__:
        thing = getattr(fxprune, name)
        parts += [
            f"::: {thing.__module__}.{thing.__qualname__}",
            "    options:",
            f'      heading: "{name}"',
            "",
        ]
    return "\n".join(parts)
