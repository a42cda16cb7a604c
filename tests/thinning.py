"""Large tables of test cases: a part of them in the default run, all of them under ``slow``."""

from collections import Counter
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


def mark_slow_cases(items: list[pytest.Item]) -> None:
    """Mark the cases of tests that are ``thinned(count)`` as slow, but for one in ``count``."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is None or item.get_closest_marker("slow") or item.get_closest_marker("zoo"):
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % mark.args[0]:
            item.add_marker("slow")
        seen[test] += 1
