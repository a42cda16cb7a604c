"""Tables of times on disk are those of this machine."""

from pathlib import Path
from typing import Any

import pytest

from fxprune.latency.layers import Widths
from fxprune.latency.table import machine, open_table
from latency.networks import CPU


def test_the_table_of_another_machine_is_measured_anew_and_said_to_be(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = machine(CPU, "eager", 1)
    other = open_table({**facts, "device": "Abacus 3000"})
    other.layers["a"] = Widths((1,), (1,), ((1.0,),))
    other.save()
    with pytest.warns(UserWarning, match=r"another machine or version \(Abacus 3000, torch .*measured anew"):
        table = open_table(facts)
    assert not table.layers
    table.save()
    assert open_table(facts).machine == facts  # no warning: there is a table of this machine now
    table.path.write_text("{")
    other.path.unlink()
    assert not open_table(facts).layers  # a broken file is no table
