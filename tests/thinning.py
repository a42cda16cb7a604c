"""Large tables of test cases: a part of them in the default run, all of them under ``slow``."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def one_in(count: int, *axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of ``axes``, marked slow but for one in ``count``.

    The sum of the positions decides, so that every entry of an axis is met with one in ``count`` entries of
    each other axis. One case is quick; all together take minutes.
    """
    cases = []
    for numbered in product(*(list(enumerate(axis)) for axis in axes)):
        is_quick = sum(position for position, _ in numbered) % count == 0
        entries = [entry for _, entry in numbered]
        cases.append(pytest.param(*entries, marks=() if is_quick else pytest.mark.slow))
    return cases
