"""The examples in the docstrings of the package run."""

import doctest
import importlib
import pkgutil

import pytest

import fxprune

MODULES = ["fxprune", *(module.name for module in pkgutil.walk_packages(fxprune.__path__, "fxprune."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert not found.failed
