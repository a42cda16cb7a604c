"""Functions of tensors as data: the calls that make them up, with their arguments.

A :class:`TensorFunction` runs like any function, and can also be read, printed, compared and pickled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PREVIOUS", "Call", "Operand", "TensorFunction", "same"]

LISTED = 8
"""Entries up to which a tensor among the arguments is printed in full."""


@dataclass(frozen=True)
class Operand:
    """The place of a tensor in a call's arguments.

    ``place`` counts the operands of the whole function; -1 (``PREVIOUS``) is the result of the call before,
    and operand 0 in the first call. With ``is_zero`` zeros of that tensor's shape take its place.
    """

    place: int
    is_zero: bool = False


PREVIOUS = Operand(-1)


@dataclass(frozen=True, eq=False)
class Call:
    """One call: ``target`` is a function, or the name of a method of the first argument."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return type(other) is Call and same(vars(self), vars(other))

    def __hash__(self) -> int:
        numbers = tuple(x for x in self.args if type(x) is int)
        return hash((_name(self.target), len(self.args), numbers, tuple(self.kwargs)))

    def run(self, tensors: Sequence[Tensor], previous: Any) -> Any:
        """Call the target with ``tensors`` as operands."""

        def tensor(operand: Operand) -> Any:
            found = previous if operand.place < 0 else tensors[operand.place]
            return torch.zeros_like(found) if operand.is_zero else found

        args = [_replace(x, tensor) for x in self.args]
        kwargs = {name: _replace(x, tensor) for name, x in self.kwargs.items()}
        if isinstance(self.target, str):
            # Labels may be laid out otherwise than what the model views, which has made it contiguous.
            sizes = self.target == "view" and not any(isinstance(x, torch.dtype) for x in args)
            return getattr(args[0], "reshape" if sizes else self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def text(self, previous: str) -> str:
        """Spell the call, with ``previous`` for the result of the call before."""
        args = [_spelled(x, previous) for x in self.args]
        if self.target is operator.getitem:
            index = args[1][1:-1] if isinstance(self.args[1], tuple) and len(self.args[1]) > 1 else args[1]
            return f"{args[0]}[{index}]"
        if self.target is getattr:
            return f"{args[0]}.{self.args[1]}"
        named = [f"{name}={_spelled(x, previous)}" for name, x in self.kwargs.items()]
        return f"{_name(self.target)}({', '.join([*args, *named])})"


@dataclass(frozen=True)
class TensorFunction:
    """A function of tensors: each call gets the operands and the result of the call before; none: operand 0.

    Functions that pickle, and methods by name, make a function that pickles. Tensors among the arguments
    are compared by their numbers.

    >>> halves = TensorFunction.of("flatten", PREVIOUS, 1).then("chunk", PREVIOUS, 2, 1)
    >>> second = halves.then(operator.getitem, PREVIOUS, 1)
    >>> second(torch.arange(8).view(1, 2, 4))
    tensor([[4, 5, 6, 7]])
    >>> print(second)
    chunk(flatten(x0, 1), 2, 1)[1]
    """

    calls: tuple[Call, ...] = ()

    @classmethod
    def of(cls, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> TensorFunction:
        """Make a function of one call; :class:`Operand` objects stand for the tensors."""
        return cls().then(target, *args, **kwargs)

    def then(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> TensorFunction:
        """Append one call."""
        return TensorFunction((*self.calls, Call(target, _plain(args), _plain(kwargs))))

    def followed_by(self, other: TensorFunction | None) -> TensorFunction:
        """Append the calls of ``other``, a function of one operand written with ``PREVIOUS``."""
        return self if other is None else TensorFunction((*self.calls, *other.calls))

    def reading_zeros(self) -> TensorFunction:
        """Return the function that reads the tensors in whose place this one puts zeros.

        >>> print(TensorFunction.of(torch.cat, [Operand(0), Operand(1, is_zero=True)]).reading_zeros())
        cat([x0, x1])
        """

        def plain(x: Any) -> Any:
            return _replace(x, lambda operand: Operand(operand.place))

        return TensorFunction(
            tuple(Call(call.target, plain(call.args), plain(call.kwargs)) for call in self.calls)
        )

    @property
    def holds_tensors(self) -> bool:
        """Whether there are tensors among its arguments.

        >>> TensorFunction.of(torch.cat, [Operand(0), torch.ones(2)]).holds_tensors
        True
        """
        return self != self.on("meta")

    def on(self, device: str) -> TensorFunction:
        """Return the function with the tensors among its arguments on another device.

        >>> TensorFunction.of(torch.add, Operand(0), torch.ones(2)).on("meta").calls[0].args[1].device
        device(type='meta')
        """

        def moved(x: Any) -> Any:
            return _replace(x, lambda operand: operand, lambda tensor: tensor.to(device))

        return TensorFunction(
            tuple(Call(call.target, moved(call.args), moved(call.kwargs)) for call in self.calls)
        )

    def __call__(self, *tensors: Tensor) -> Any:
        result: Any = tensors[0] if tensors else None
        for call in self.calls:
            result = call.run(tensors, result)
        return result

    def __str__(self) -> str:
        text = "x0"
        for call in self.calls:
            text = call.text(text)
        return text


# -- arguments -------------------------------------------------------------------------------------
def _plain(x: Any) -> Any:
    """``x`` with lists, tuples and dicts in the place of their subclasses (those of fx, ``torch.Size``)."""
    if isinstance(x, list):
        return [_plain(item) for item in x]
    if isinstance(x, tuple):
        return tuple(_plain(item) for item in x)
    if isinstance(x, dict):
        return {key: _plain(item) for key, item in x.items()}
    return x


def _replace(x: Any, operand: Callable[[Operand], Any], tensor: Callable[[Tensor], Any] | None = None) -> Any:
    if isinstance(x, Operand):
        return operand(x)
    if isinstance(x, Tensor):
        return x if tensor is None else tensor(x)
    if type(x) is list or type(x) is tuple:
        return type(x)(_replace(item, operand, tensor) for item in x)
    if isinstance(x, dict):
        return {key: _replace(item, operand, tensor) for key, item in x.items()}
    if isinstance(x, slice):
        return slice(*(_replace(item, operand, tensor) for item in (x.start, x.stop, x.step)))
    return x


def _name(target: Callable[..., Any] | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _spelled(x: Any, previous: str) -> str:
    if isinstance(x, Operand):
        text = previous if x.place < 0 else f"x{x.place}"
        return f"zeros_like({text})" if x.is_zero else text
    if isinstance(x, Tensor):
        kind = str(x.dtype).removeprefix("torch.")
        size = "x".join(map(str, x.shape))
        return str(x.tolist()) if x.numel() <= LISTED and not x.is_meta else f"<{kind} {size}>"
    if isinstance(x, list):
        return f"[{', '.join(_spelled(item, previous) for item in x)}]"
    if isinstance(x, tuple):
        inner = ", ".join(_spelled(item, previous) for item in x)
        return f"({inner},)" if len(x) == 1 else f"({inner})"
    if isinstance(x, slice):
        ends = ["" if end is None else _spelled(end, previous) for end in (x.start, x.stop)]
        return ":".join(ends) + ("" if x.step is None else f":{_spelled(x.step, previous)}")
    return "..." if x is Ellipsis else repr(x)


# -- equality --------------------------------------------------------------------------------------
def same(a: Any, b: Any) -> bool:
    """Compare two pieces of data by content: tensors by shape, type and numbers, containers member-wise."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.is_meta == b.is_meta
        return alike and (a.is_meta or torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(item, b[key]) for key, item in a.items())
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if is_dataclass(a):
        names = [one.name for one in fields(a) if one.compare]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)
