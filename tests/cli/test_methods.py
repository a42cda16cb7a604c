"""The list of methods that is read off their source is what the methods say themselves."""

from typing import Any

import pytest

from fxprune import methods
from fxprune.cli import COMMANDS, run
from fxprune.cli.methods import COLUMNS, FOLDER, read_entries, read_entry


def test_entries_are_those_of_the_methods() -> None:
    entries = {entry.name: entry for entry in read_entries(FOLDER)}
    assert sorted(entries) == methods.names()
    for name, entry in entries.items():
        method = methods.get(name)
        assert (entry.summary, entry.paper) == (method.summary, method.paper)
        assert entry.needs == sorted(method.needs)
        options = methods.options(name)
        assert entry.options == {option.name: option.default for option in options.values()}
        assert entry.notes == {option.name: option.help for option in options.values() if option.help}
        assert entry.switches == {option.name for option in options.values() if option.types == (bool,)}


def test_every_cell_of_the_table_is_there_in_full(capsys: Any) -> None:
    assert run(["methods"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    entries = read_entries(FOLDER)
    edges, at = [], 0
    for width in COLUMNS.values():
        edges.append((at, at + width))
        at += width + 2
    columns = [" ".join(" ".join(line[a:b].strip() for line in lines[2:]).split()) for a, b in edges]
    for entry in entries:
        flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in entry.options.items())
        for cell, column in zip(
            (entry.name, entry.summary, " ".join(entry.needs), flags, entry.paper), columns, strict=True
        ):
            assert cell in column


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", "no function of that name"),
        ("def one(): return Method(summary='a' + b)", "malformed"),
        ("def one(*, rounds=DEFAULT): return Method()", "malformed"),
    ],
)
def test_what_is_not_written_out_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_entry("one", source)


def test_the_help_of_a_command_is_the_first_line_of_its_docstring() -> None:
    for name, (module, summary) in COMMANDS.items():
        function = getattr(__import__(module, fromlist=[name]), name)
        assert function.__doc__.splitlines()[0] == summary
