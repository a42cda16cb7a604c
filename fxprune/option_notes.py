"""Read the paragraph ``Options:`` of a method's docstring, with or without importing the method."""

from __future__ import annotations


def option_notes(doc: str) -> dict[str, str]:
    """Return the line about each option.

    >>> option_notes("Prune.\\n\\nOptions:\\n    rounds: number of rounds,\\n        at least 1.\\n")
    {'rounds': 'number of rounds, at least 1.'}
    """
    notes: dict[str, str] = {}
    current = ""
    for line in doc.partition("\nOptions:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("     "):
            notes[current] += " " + line.strip()
        else:
            current, _, text = line.strip().partition(": ")
            notes[current] = text
    return notes
