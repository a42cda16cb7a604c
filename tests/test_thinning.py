"""The part of a table that the default run takes."""

from thinning import one_in


def test_one_in_so_many_and_every_entry_is_among_them() -> None:
    cases = one_in(4, "abcdefgh", range(6), (True, False))
    quick = [case.values for case in cases if not case.marks]
    assert len(cases) == len({case.values for case in cases}) == 96
    assert len(quick) == 24
    assert [len({values[axis] for values in quick}) for axis in range(3)] == [8, 6, 2]
    assert all(case.marks[0].name == "slow" for case in cases if case.marks)
