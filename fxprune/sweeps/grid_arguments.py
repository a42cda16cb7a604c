"""Check the sides of a grid before any cell is done: what a caller gave comes in, lists or errors go out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxprune.arguments import check_flags, takes
from fxprune.capture.errors import check_module
from fxprune.capture.tracer.isolation import restore_rng, rng_state, seed_rng
from fxprune.methods import Method
from fxprune.search import ask
from fxprune.whole_files import check_file_name

__all__ = ["check_entries", "check_folder", "check_functions", "numbers_of", "seeds_of", "sparsities_of"]


def check_functions(model_fn: Any, train_fn: Any, data: Any = None, **flags: object) -> None:
    """``TypeError`` for a network instead of the function that makes it, and what is no function."""
    check_flags(**flags)
    _check_function("model_fn", model_fn, 0, "a function that makes the network")
    if train_fn is not None:
        meant = "a function of (model, seed) that returns an accuracy, or numbers by name"
        _check_function("train_fn", train_fn, 2, meant)
    if callable(data) and not takes(data, 1):
        raise TypeError(
            f"data: a function is called with the seed of a cell, got one of {inspect.signature(data)}"
        )


def _check_function(argument: str, value: Any, given: int, meant: str) -> None:
    if isinstance(value, nn.Module) or not callable(value):
        raise TypeError(f"{argument}: expected {meant}, got a {type(value).__name__}")
    if not takes(value, given):
        raise TypeError(f"{argument}: expected {meant}, got one of {inspect.signature(value)}")


NOT_ASKED = ("example_inputs", "progress")
"""Arguments of ``apply`` that say nothing about what is to be done."""


class Cell(Protocol):
    """One network to prune, by the label of its method."""

    @property
    def method(self) -> str:
        """The label of its method."""

    @property
    def sparsity(self) -> float:
        """The fraction to remove."""

    @property
    def seed(self) -> int:
        """The seed that it is built under."""


def check_entries(
    model_fn: Any,
    entries: Mapping[str, tuple[str | Method, Mapping[str, Any]]],
    cells: Iterable[Cell],
    data: Any,
    options: Mapping[str, Any],
) -> None:
    """Raise what :func:`fxprune.apply` says of the arguments of a method that is still to run.

    A network is built for that, under the first seed that is left.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        if cell.method in entries:
            first.setdefault(cell.method, cell)
    if not first:
        return
    seed = next(iter(first.values())).seed
    with forked_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        seed_all(seed)
        model = model_fn()
        check_module(model, "model_fn()")
        given = data(seed) if callable(data) else data
        for label, cell in first.items():
            method, own = entries[label]
            known = {name: x for name, x in {**options, **own}.items() if name not in NOT_ASKED}
            try:
                ask(model, method, cell.sparsity, data=given, seed=cell.seed, **known)
            except (TypeError, ValueError) as error:
                name = method if isinstance(method, str) else method.name
                raise type(error)(f"{error}" if label == name else f"{label!r}: {error}") from error


@contextmanager
def forked_rng() -> Iterator[None]:
    """Put the random generators of PyTorch, Python and NumPy back afterwards."""
    before = rng_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            restore_rng(before)


def seed_all(seed: int) -> None:
    """Seed the random generators of PyTorch, Python and NumPy."""
    torch.manual_seed(seed)
    seed_rng(seed % 2**32)  # NumPy takes no other


def check_folder(given: Any) -> Path:
    """Return the folder of a sweep; ``TypeError`` or ``ValueError`` where it is none, or a file."""
    check_file_name(given, "folder", "results", "a folder")
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: there is a file of that name; expected a folder")
    return folder


def sparsities_of(sparsities: Any) -> list[float]:
    """Return the sparsities of a grid, one or several.

    >>> sparsities_of(0.5)
    [0.5]
    """
    found = _side("sparsities", sparsities, Real, "fractions, as in [0.5, 0.9]")
    for sparsity in found:
        if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
            raise TypeError(f"sparsities: {sparsity!r}: expected a fraction in [0, 1), as in 0.9")
        share = float(sparsity)
        if not 0 <= share < 1:
            hint = f"; {sparsity} percent is {share / 100:g}" if 1 < share < 100 else ""
            raise ValueError(f"sparsities: {sparsity!r}: expected a fraction in [0, 1){hint}")
    return [float(sparsity) for sparsity in found]


def seeds_of(seeds: Any) -> list[int]:
    """Return the seeds of a grid, one or several.

    >>> seeds_of(range(2))
    [0, 1]
    """
    found = _side("seeds", seeds, Integral, "integers, as in [0, 1, 2]")
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
            raise TypeError(f"seeds: {seed!r}: expected an integer of at least 0")
    return [int(seed) for seed in found]  # those of NumPy cannot be written to a file


def _side(argument: str, given: Any, number: type, meant: str) -> list[Any]:
    """Return a side of a grid as a list; one number is a list of one."""
    some = given.tolist() if isinstance(given, Tensor) else given
    some = [some] if isinstance(some, number) else some
    if not isinstance(some, Iterable) or isinstance(some, (str, Mapping)):
        raise TypeError(f"{argument}={given!r}: expected a list of {meant}")
    return list(some)


def numbers_of(trained: Any) -> dict[str, Any]:
    """Return what a ``train_fn`` returned as numbers by name."""
    if isinstance(trained, Mapping):
        return dict(trained)
    try:
        return {"accuracy": float(trained)}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train_fn returned {trained!r}: expected an accuracy, or a dict of numbers by name"
        ) from error
