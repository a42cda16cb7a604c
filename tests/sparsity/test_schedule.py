from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.sparsity.schedule import (
    Cubic,
    Custom,
    Exponential,
    Linear,
    OneShot,
    Schedule,
    Sigmoid,
    resolve,
)

FALLING = [Exponential, Linear, Cubic, Sigmoid]


@pytest.mark.parametrize("kind", FALLING)
@given(target=st.floats(1e-4, 1.0), rounds=st.integers(1, 30))
def test_from_one_down_to_the_target(kind: type[Exponential], target: float, rounds: int) -> None:
    schedule = kind(rounds)
    path = [1.0] + [schedule.density(t, target) for t in range(1, rounds + 1)]
    assert path[-1] == pytest.approx(target, rel=1e-9)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(path))


def test_published_values() -> None:
    assert [Exponential(4).density(t, 0.01) for t in (1, 2, 3, 4)] == pytest.approx(
        [0.31623, 0.1, 0.031623, 0.01], rel=1e-4
    )
    assert [Linear(4).density(t, 0.01) for t in (1, 2, 3, 4)] == pytest.approx([0.7525, 0.505, 0.2575, 0.01])
    assert 1 - Cubic(2).density(1, 0.1) == pytest.approx(0.7875)
    # Symmetric about its centre: half of what is to go is gone half-way.
    assert Sigmoid(10).density(5, 0.2) == pytest.approx(0.6)
    assert OneShot().density(1, 0.3) == 0.3


def test_names_take_the_defaults_rounds() -> None:
    assert resolve(None, Exponential(7)) == Exponential(7)
    assert resolve("linear", Exponential(7)) == Linear(7)
    assert resolve("Cubic(12)", Exponential(7)) == Cubic(12)
    assert resolve("sigmoid", OneShot()) == Sigmoid(100)
    assert resolve("oneshot", Exponential(7)) == OneShot()
    assert resolve(Linear(3), Exponential(7)) == Linear(3)


def test_a_function_is_a_schedule() -> None:
    def stairs(t: int, rounds: int, target: float) -> float:
        return 1.0 if t < rounds else target

    schedule = resolve(stairs, Exponential(5))
    assert isinstance(schedule, Custom)
    assert schedule.rounds == 5
    assert [schedule.density(t, 0.1) for t in (1, 4, 5)] == [1.0, 1.0, 0.1]


def test_an_object_of_ones_own_is_a_schedule() -> None:
    class Half:
        rounds = 2

        def density(self, t: int, target: float) -> float:
            return 0.5 if t == 1 else target

    half = Half()
    assert isinstance(half, Schedule)
    assert resolve(half, OneShot()) is half


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        ("exponentail", ValueError, "schedule='exponentail': expected one of 'oneshot', 'exponential'"),
        ("linear(x)", ValueError, r"schedule='linear\(x\)'"),
        ("linear(0)", ValueError, "rounds=0"),
        (3, TypeError, "schedule=3"),
        (Exponential, TypeError, "expected a name, a schedule such as"),
    ],
)
def test_bad_schedules(schedule: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(schedule, OneShot())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FALLING)
def test_bad_rounds(kind: type[Exponential]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: rounds=0"):
        kind(0)
    with pytest.raises(TypeError, match=rf"{kind.__name__}: rounds=2\.5"):
        kind(2.5)  # type: ignore[arg-type]


def test_other_bad_values() -> None:
    with pytest.raises(ValueError, match="OneShot: rounds=2"):
        OneShot(2)
    with pytest.raises(ValueError, match="steepness=-1"):
        Sigmoid(10, steepness=-1)
    with pytest.raises(ValueError, match=r"density 1\.5 after round 1 of 3"):
        Custom(lambda t, rounds, target: 1.5, 3).density(1, 0.1)
    assert Sigmoid(10, steepness=1e6).density(10, 0.25) == 0.25  # no overflow
