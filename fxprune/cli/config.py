"""Read ``--config run.toml``: the flags of a command by their names; words of the command line go first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxprune.keywords import nearest

__all__ = ["read_config", "read_toml", "take_config"]


def take_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Take ``--config FILE`` out of the words of a command.

    >>> rest, path = take_config(["prune", "--config", "run.toml", "-s", "0.5"])
    >>> rest, str(path)
    (['prune', '-s', '0.5'], 'run.toml')
    """
    rest: list[str] = []
    path = None
    waiting = False
    for word in words:
        if waiting:
            path, waiting = Path(word), False
        elif word == "--config":
            waiting = True
        elif word.startswith("--config="):
            path = Path(word.partition("=")[2])
        else:
            rest.append(word)
    if waiting:
        raise ValueError("--config: expected a file such as run.toml after it")
    return rest, path


def read_toml(path: Path, flag: str = "--config") -> dict[str, Any]:
    """Read a TOML file; ``FileNotFoundError`` or ``ValueError`` that names it and the ``flag`` that did."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no such file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: not a TOML file ({error})") from error


def read_config(path: Path, known: dict[str, str]) -> dict[str, Any]:
    """Read the values of a command's flags.

    Args:
        path: the file. Names are those of the flags, with dashes or underscores; tables are not used.
        known: name of each flag -> name of its parameter.

    Returns:
        Name of a parameter -> its value: text, a number, a truth value, or a list of those.

    Raises ``ValueError`` for a name that is no flag, with the nearest one.
    """
    found = {}
    for key, value in read_toml(path).items():
        name = key.replace("_", "-")
        if name not in known:
            near = [*nearest(name.replace("-", "_"), [flag.replace("-", "_") for flag in known], 1)]
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(sorted(known))}"
            raise ValueError(f"--config {path}: {key!r} is no flag of this command; {hint}")
        if isinstance(value, dict):
            value = ",".join(f"{layer}={number}" for layer, number in value.items())
        found[known[name]] = value
    return found
