"""Large tables of test cases: a part of them in the default run, all of them under ``slow``."""

import zlib
from collections import Counter, defaultdict
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


MOST = 8
"""Cases of one test that the default run takes."""


def mark_slow_cases(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what the default run leaves out of tests with many cases.

    Of a test that is ``thinned(count)`` one in ``count`` stays; of any test ``MOST`` cases stay, drawn by
    their names, unless it is marked ``every_case``.
    """
    quick: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("zoo"):
            continue
        test, mark = item.nodeid.partition("[")[0], item.get_closest_marker("thinned")
        if mark is not None and seen[test] % mark.args[0]:
            item.add_marker("slow")
        elif not item.get_closest_marker("every_case"):
            quick[test].append(item)
        seen[test] += 1
    for cases in quick.values():
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[MOST:]:
            item.add_marker("slow")
