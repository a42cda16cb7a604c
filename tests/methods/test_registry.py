import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from fxprune import methods
from fxprune.methods import Method, from_scores


def test_the_folder_is_the_registry() -> None:
    folder = Path(str(methods.__file__)).parent
    files = {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")}
    files |= {path.parent.name.replace("_", "-") for path in folder.glob("*/__init__.py")}
    assert set(methods.names()) == files
    assert methods.names() == sorted(files)
    assert {"random", "magnitude", "snip", "synflow"} <= files


@pytest.mark.parametrize("name", methods.names())
def test_every_method_introduces_itself(name: str) -> None:
    method = methods.get(name)
    assert isinstance(method, Method)
    assert method.name == name
    assert method.summary
    assert "\n" not in method.summary
    assert method.paper
    assert method.needs <= {"data", "graph"}


@pytest.mark.parametrize("name", methods.names())
def test_options_are_typed_keywords_with_defaults_and_words(name: str) -> None:
    for option in methods.options(name).values():
        assert option.help, f"{name}: say what {option.name} is under 'Options:' in the docstring"
        option.check(name, option.default)


@pytest.mark.parametrize("name", ["contract", "data", "gradients"])
def test_private_files_are_no_methods(name: str) -> None:
    assert name not in methods.names()


@pytest.mark.parametrize(
    ("name", "near"),
    [("sinflow", "'synflow'"), ("SNIP", "'snip'"), ("magnitud", "'magnitude'")],
)
def test_unknown_names_get_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"method='{name}' is unknown; did you mean .*{near}"):
        methods.get(name)


def test_a_name_that_is_near_none_gets_the_list() -> None:
    with pytest.raises(ValueError, match=r"method='zzz' is unknown; there are alps, .*wanda"):
        methods.get("zzz")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch": 3}, TypeError, "method 'snip' has no option 'batch'; its options: batches, mode, average"),
        ({"batches": "3"}, TypeError, "method 'snip': batches='3', expected int"),
        ({"batches": True}, TypeError, "batches=True, expected int"),
        ({"batches": 1.5}, TypeError, "batches=1.5, expected int"),
        ({"batches": 0}, ValueError, "batches=0, expected an integer of at least 1"),
        ({"mode": "test"}, ValueError, "method 'snip': mode='test', expected one of 'train', 'eval'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        methods.get("snip", **options)


def test_methods_without_options_say_so() -> None:
    with pytest.raises(
        TypeError, match="method 'magnitude' has no option 'rounds'; its options: none at all"
    ):
        methods.get("magnitude", rounds=3)


def test_option_descriptions() -> None:
    mode = methods.options("snip")["mode"]
    assert mode.choices == ("train", "eval")
    assert mode.types == (str,)
    assert mode.default == "train"
    assert mode.help.startswith("run the model in train mode")


def test_resolve_takes_objects() -> None:
    own = Method("own", from_scores(lambda problem, masks: {}))
    assert methods.resolve(own) is own
    assert methods.resolve("snip", batches=2).name == "snip"
    with pytest.raises(TypeError, match="method 'own' is a Method already; set 'rounds'"):
        methods.resolve(own, rounds=3)
    with pytest.raises(TypeError, match="method=3: expected one of"):
        methods.resolve(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "methods",
        "scoring.contract",
        "scoring.ablations",
        "methods.random",
        "methods.magnitude",
        "methods.snip",
    ],
)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fxprune.{name}")).failed == 0


def test_options_are_read_off_signature_and_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(*, lr: float = 0.1, chunk: int | None = None, alpha: float = 1) -> Method:
        """A method.

        Options:
            lr: step size, which
                goes on in the next line
            chunk: how many at once

        alpha: is no option's description here.
        """
        return Method("own", from_scores(lambda problem, masks: {}))

    monkeypatch.setattr(methods, "_factory", lambda name: factory)
    found = methods.options("own")
    assert found["lr"].help == "step size, which goes on in the next line"
    assert found["chunk"].types == (int, type(None))
    assert found["alpha"].help == ""
    assert methods.get("own", lr=1, chunk=None).name == "own"
    with pytest.raises(TypeError, match=r"chunk=2\.5, expected int or None"):
        methods.get("own", chunk=2.5)
