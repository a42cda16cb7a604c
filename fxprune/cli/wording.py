"""Say in flags of the command line what messages of the library say in arguments of Python."""

from __future__ import annotations

import re

from fxprune.cli.data_sources import EXPECTED

__all__ = ["in_flags"]

WORDS = (
    (r"data=\.\.\., a pair \(x, y\) or an iterable of batches", f"--data: {EXPECTED}"),
    (r"data=\.\.\.", "--data"),
    (
        r"(unexpected extra argument.*)$",
        r"\1; a flag of several values is given once for each, as in --exclude A --exclude B",
    ),
    (
        r"example_inputs: (the input size of .* is not known); pass a tensor, a tuple or a dict",
        r"\1; let the factory return a pair of it and example inputs, as in `return net, torch.ones(2, 8)`",
    ),
)


def in_flags(text: str) -> str:
    """Return a message with flags for arguments.

    >>> in_flags("budget='owl': it needs data=...")
    "budget='owl': it needs --data"
    """
    for pattern, words in WORDS:
        text = re.sub(pattern, words, text)
    return text
