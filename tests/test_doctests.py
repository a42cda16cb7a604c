"""The examples in the docstrings of the package run."""

import doctest
import importlib
import pkgutil

import pytest

import fxprune

MODULES = ["fxprune", *(module.name for module in pkgutil.walk_packages(fxprune.__path__, "fxprune."))]

LIBRARIES = {"fxprune.plot": "matplotlib"} | {
    f"fxprune.training.callbacks.{name}": name
    for name in ("accelerate", "fastai", "lightning", "transformers")
}
"""Modules whose examples need a library that is optional."""


@pytest.mark.every_case
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LIBRARIES else name
        for name in MODULES
        if not name.endswith("__main__")
    ],
)
def test_examples(name: str) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    found = doctest.testmod(importlib.import_module(name))
    assert not found.failed
