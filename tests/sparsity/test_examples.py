"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["masks", "budget", "schedule", "granularity", "select"])
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fxprune.sparsity.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
