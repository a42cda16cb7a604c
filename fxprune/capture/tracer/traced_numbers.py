"""Numbers that remember where they came from.

In: a Python number read off a shape, and the graph node that computes it. Out: an ``int`` or ``float``
that is the number for every purpose (``if``, ``range``, indexing, C code) and whose arithmetic goes on
being recorded, so that the batch size stays free in the captured graph. Comparisons are told: what the code
decided by a number holds for the numbers that decide alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import fx

__all__ = ["NumberRecorder", "TracedFloat", "TracedInt", "plain_number"]


class NumberRecorder(Protocol):
    """Describe what a traced number needs of the recorder: a node for a result, notice of comparisons and of
    plain numbers made of it.

    A node is made for the result of ``function`` on ``args``.
    """

    def number(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any: ...

    def decided(self, function: Callable[..., Any], number: Any, other: Any, result: bool) -> bool: ...

    def made_plain(self, number: Any) -> None: ...


class TracedInt(int):
    """An ``int`` with the fx node that computes it."""

    node: fx.Node
    recorder: NumberRecorder

    def __copy__(self) -> TracedInt:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


class TracedFloat(float):
    """A ``float`` with the fx node that computes it."""

    node: fx.Node
    recorder: NumberRecorder

    def __copy__(self) -> TracedFloat:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedFloat:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


def plain_number(value: Any) -> Any:
    """The number without its history."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


def _binary(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        args = (other, self) if reflected else (self, other)
        return self.recorder.number(function, args, function(plain_number(args[0]), plain_number(args[1])))

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return self.recorder.number(function, (self, *args), function(plain_number(self), *args))

    return method


def _comparison(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        result = function(plain_number(self), plain_number(other))
        return self.recorder.decided(function, self, other, result)

    return method


def _plain(kind: type) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        self.recorder.made_plain(self)
        return kind(plain_number(self))

    return method


def _by_numpy(self: Any, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """Compute what a function of NumPy gives, in recorded arithmetic where there is one for it.

    Rounded fractions stay fractions here, as in NumPy.
    """
    name = ufunc.__name__
    function = OF_NUMPY.get(name) if method == "__call__" and not options else None
    if function is not None and all(isinstance(number, int | float) for number in inputs):
        args = [float(number) if type(number).__module__ == "numpy" else number for number in inputs]
        if name in ROUNDED:
            self.recorder.made_plain(self)  # the number of one size more may be the same
        result = self.recorder.number(function, tuple(args), function(*map(plain_number, args)))
        # NumPy rounds whole numbers to fractions up to version 2.0, and leaves them whole from then on.
        fraction = name in ROUNDED and isinstance(ufunc(*map(plain_number, inputs)), np.floating)
        return result * 1.0 if fraction else result
    for number in inputs:
        if isinstance(number, TracedInt | TracedFloat):
            number.recorder.made_plain(number)
    return getattr(ufunc, method)(*map(plain_number, inputs), **options)


def _rounded(self: Any, decimals: int = 0, out: Any = None) -> Any:
    """Round as ``numpy.round`` does, which asks its argument to."""
    self.recorder.made_plain(self)
    return round(self, decimals) * 1.0


def _of_type(self: Any, kind: Any) -> Any:
    """Convert what has come of a function of NumPy, as its numbers are converted."""
    # A class that stands for ``int`` in a trace is no type to NumPy.
    whole = isinstance(kind, type) and issubclass(kind, int) and kind is not bool
    asked = np.dtype(int if whole else kind)
    if asked == np.dtype(int):
        return math.trunc(self)
    if asked == np.dtype(float):
        return self * 1.0
    self.recorder.made_plain(self)
    return asked.type(plain_number(self))


def _item(self: Any) -> Any:
    """Give the number itself, as what comes of functions of NumPy gives a number of Python."""
    return self


def _truth(self: Any) -> bool:
    return bool(self != 0)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
}
UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "abs": operator.abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "round": round,
}

ROUNDED = frozenset(("floor", "ceil", "trunc", "rint"))
OF_NUMPY: dict[str, Callable[..., Any]] = {
    **{name: UNARY[name] for name in ("floor", "ceil", "trunc")},
    **{"rint": round, "negative": operator.neg, "absolute": abs, "sqrt": math.sqrt},
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv},
    **{"floor_divide": operator.floordiv, "remainder": operator.mod, "power": operator.pow},
}

COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)

for _class, _base in ((TracedInt, int), (TracedFloat, float)):
    for _name, _function in BINARY.items():
        setattr(_class, f"__{_name}__", _binary(_function, reflected=False))
        setattr(_class, f"__r{_name}__", _binary(_function, reflected=True))
    for _name, _function in UNARY.items():
        setattr(_class, f"__{_name}__", _unary(_function))
    for _function in COMPARISONS:
        setattr(_class, f"__{_function.__name__}__", _comparison(_function))
    for _name, _method in {"bool": _truth, "hash": _base.__hash__}.items():
        setattr(_class, f"__{_name}__", _method)
    _for_numpy: dict[str, Callable[..., Any]]
    _for_numpy = {"__array_ufunc__": _by_numpy, "round": _rounded, "astype": _of_type, "item": _item}
    for _name in _for_numpy:
        setattr(_class, _name, _for_numpy[_name])
    for _kind in (int, float):
        setattr(_class, f"__{_kind.__name__}__", _plain(_kind))
