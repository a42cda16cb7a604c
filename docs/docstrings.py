"""Make the docstrings of the package readable as Markdown; mkdocstrings loads this (``mkdocs.yml``)."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrite each docstring before its sections are told apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Fence examples that stand outside of a section, and show roles (``:func:``) as plain code."""
    text = re.sub(r":(?:func|class|meth|mod|data):(?=`)", "", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    return re.sub(r"^>>> (?:.+\n?)*", lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text, flags=re.M)
