"""The list of methods that is read off their source is what the methods say themselves."""

import pytest

from fxprune import methods
from fxprune.cli import COMMANDS
from fxprune.cli.methods import FOLDER, read_entries, read_entry


def test_entries_are_those_of_the_methods() -> None:
    entries = {entry.name: entry for entry in read_entries(FOLDER)}
    assert sorted(entries) == methods.names()
    for name, entry in entries.items():
        method = methods.get(name)
        assert (entry.summary, entry.paper) == (method.summary, method.paper)
        assert entry.needs == sorted(method.needs)
        assert entry.options == {option.name: option.default for option in methods.options(name).values()}


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
