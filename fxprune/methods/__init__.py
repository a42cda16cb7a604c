"""The methods: this folder is the registry.

A file ``<name>.py`` holds one public factory of that name, ``def <name>(*, option: type = default) ->
Method``; a dash in the public name is an underscore in the file's. Its keyword arguments are the method's
options, here and on the command line, and nothing has to be registered anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from fxprune.keywords import refuse_unknown
from fxprune.option_notes import option_notes
from fxprune.scoring.ablations import ablated, redraw
from fxprune.scoring.contract import Found, Method, Problem, Scores, Weights, from_scores, prune_in_rounds
from fxprune.scoring.distributed import agree, as_dtensors, local_rows
from fxprune.scoring.found import new_weights, separate

__all__ = [
    "Found",
    "Method",
    "Option",
    "Problem",
    "Scores",
    "Weights",
    "ablated",
    "agree",
    "as_dtensors",
    "common_options",
    "from_scores",
    "get",
    "local_rows",
    "names",
    "new_weights",
    "options",
    "prune_in_rounds",
    "redraw",
    "resolve",
    "separate",
]


@dataclass(frozen=True)
class Option:
    """An option of a method: what its factory's signature and docstring say about one keyword argument.

    ``types``: accepted classes. ``choices``: accepted values, empty where any value of the type will do.
    """

    name: str
    types: tuple[type, ...]
    default: Any
    choices: tuple[Any, ...] = ()
    help: str = ""

    def check(self, method: str, value: object) -> None:
        """``TypeError`` or ``ValueError`` unless ``value`` is of the option's type and among its choices."""
        if self.choices and value not in self.choices:
            accepted = ", ".join(repr(choice) for choice in self.choices)
            raise ValueError(f"method {method!r}: {self.name}={value!r}, expected one of {accepted}")
        fits = isinstance(value, self.types) or (float in self.types and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in self.types):
            accepted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in self.types)
            raise TypeError(f"method {method!r}: {self.name}={value!r}, expected {accepted}")


def names(**others: NoReturn) -> list[str]:
    """Public names of all methods, sorted.

    >>> {"magnitude", "random", "snip", "synflow"} <= set(names())
    True
    """
    refuse_unknown(names, others, "list_methods")
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in files if not name.startswith("_"))


def get(name: str, **given: Any) -> Method:
    """The method called ``name``, with the options ``given``: its own, and those of ``common_options``.

    Errors: ``ValueError`` for an unknown name (the nearest ones are named) or a value outside an option's
    choices; ``TypeError`` for an option the method does not have, or one of the wrong type.

    >>> get("magnitude").name
    'magnitude'
    """
    factory = _factory(name)
    common = common_options()
    accepted = options(name) | common
    for option, value in given.items():
        if option not in accepted:
            known = ", ".join(options(name)) or "none at all"
            raise TypeError(f"method {name!r} has no option {option!r}; its options: {known}")
        accepted[option].check(name, value)
    own = {option: value for option, value in given.items() if option not in common}
    return ablated(factory(**own), **{option: given[option] for option in common if option in given})


def resolve(method: str | Method, **given: Any) -> Method:
    """``get`` for a name; a ``Method`` is returned as it is, and takes the common options only."""
    if isinstance(method, str):
        return get(method, **given)
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}: expected one of {', '.join(names())}, or a fxprune.Method")
    common = common_options()
    for option, value in given.items():
        if option not in common:
            raise TypeError(f"method {method.name!r} is a Method already; set {option!r} where it is made")
        common[option].check(method.name, value)
    return ablated(method, **given)


def options(name: str) -> dict[str, Option]:
    """The options of the method called ``name``, by name, in the order of its signature.

    >>> options("synflow")["rounds"].default
    100
    """
    return _keywords(_factory(name))


def common_options() -> dict[str, Option]:
    """The options that every method takes besides its own: the sanity checks of ``ablated``.

    >>> list(common_options())
    ['shuffle', 'invert']
    """
    return _keywords(ablated)


def _keywords(function: Callable[..., Method]) -> dict[str, Option]:
    hints = typing.get_type_hints(function)
    notes = option_notes(inspect.getdoc(function) or "")
    return {
        parameter.name: _option(parameter, hints[parameter.name], notes.get(parameter.name, ""))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _factory(name: str) -> Callable[..., Method]:
    known = names()
    if name not in known:
        near = difflib.get_close_matches(str(name).lower().replace("_", "-"), known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"method={name!r} is unknown; {hint}")
    module = name.replace("-", "_")
    factory: Callable[..., Method] = getattr(importlib.import_module(f"{__name__}.{module}"), module)
    return factory


def _option(parameter: inspect.Parameter, hint: Any, note: str) -> Option:
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literal = next((kind for kind in types if get_origin(kind) is Literal), None)
    if literal is not None:
        choices = (*get_args(literal), *[None for kind in types if kind is NoneType])
        return Option(parameter.name, tuple({type(c) for c in choices}), parameter.default, choices, note)
    classes = tuple(get_origin(kind) or kind for kind in types)
    return Option(parameter.name, classes, parameter.default, (), note)
