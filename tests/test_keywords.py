"""Arguments that a function does not have are explained; numbers of things agree with their word."""

import pytest

from fxprune.keywords import counted, refuse_unknown


def function(example_inputs: object, runtimes: object = ()) -> None: ...


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("runtime", r"did you mean 'runtimes'\?"),
        ("input_size", r"did you mean 'example_inputs', a tensor such as"),
        ("colour", "its arguments: example_inputs, runtimes$"),
    ],
)
def test_the_argument_that_was_meant_is_named(given: str, hint: str) -> None:
    refuse_unknown(function, {})
    with pytest.raises(TypeError, match=f"^function has no argument '{given}'; {hint}"):
        refuse_unknown(function, {given: 1})


def test_one_is_singular() -> None:
    assert [counted(n, "run") for n in (0, 1, 1000)] == ["0 runs", "1 run", "1,000 runs"]
