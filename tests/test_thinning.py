"""The part of a table that the default run takes."""

from collections import Counter
from typing import Any

import pytest
from thinning import MOST, mark_slow_cases, one_in


def test_one_in_so_many_and_every_entry_is_among_them() -> None:
    cases = one_in(4, "abcdefgh", range(6), (True, False))
    quick = [case.values for case in cases if not case.marks]
    assert len(cases) == len({case.values for case in cases}) == 96
    assert len(quick) == 24
    assert [len({values[axis] for values in quick}) for axis in range(3)] == [8, 6, 2]
    assert all(case.marks[0].name == "slow" for case in cases if case.marks)


class Case:
    """A collected case with marks."""

    def __init__(self, nodeid: str, **marks: tuple[int, ...]) -> None:
        self.nodeid = nodeid
        self.marks = {name: getattr(pytest.mark, name)(*args).mark for name, args in marks.items()}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = getattr(pytest.mark, name).mark


def test_one_in_so_many_cases_of_a_thinned_test_is_quick() -> None:
    thin, plain = [Case(f"a[{index}]", thinned=(3,)) for index in range(7)], [Case("b[0]"), Case("b[1]")]
    thin.insert(1, Case("a[slow]", thinned=(3,), slow=()))
    items: Any = [*thin, *plain]
    mark_slow_cases(items)
    assert [case.nodeid for case in items if "slow" not in case.marks] == [
        "a[0]",
        "a[3]",
        "a[6]",
        "b[0]",
        "b[1]",
    ]


def test_of_many_cases_a_few_are_quick() -> None:
    many, few = [Case(f"a[{index}]") for index in range(50)], [Case(f"b[{index}]") for index in range(MOST)]
    all_of_them = [Case(f"c[{index}]", every_case=()) for index in range(50)]
    items: Any = [*many, *few, *all_of_them]
    mark_slow_cases(items)
    quick = Counter(case.nodeid[0] for case in items if "slow" not in case.marks)
    assert quick == {"a": MOST, "b": MOST, "c": 50}
