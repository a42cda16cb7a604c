"""Made-up numbers where shapes are not enough: a module that looks at its data is run on some, once.

In: meta tensors and a module's real parameters. Out: results of the right shapes, for data of no meaning.
Nothing of the module is written; numbers are drawn from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.capture.tracer.meta_values import MOVERS, Shadows, map_structure
from fxprune.capture.tracer.spelling import CONSTRUCTORS
from fxprune.capture.tracer.traced_numbers import plain_number

__all__ = ["MadeUp", "has_no_shapes", "needs_numbers"]

CPU = torch.device("cpu")


def needs_numbers(error: BaseException) -> bool:
    """Whether an error says that shapes did not suffice."""
    from_value = isinstance(error, NotImplementedError) or "asks for the numbers" in str(error)
    return from_value or "meta" in str(error)


def has_no_shapes(error: BaseException) -> bool:
    """Whether PyTorch cannot work out an operation in shapes alone, though numbers need not matter."""
    return isinstance(error, NotImplementedError) and "Meta kernel registered" in str(error)


class MadeUp(Shadows):
    """Stands in for :class:`Shadows`, with tensors on the CPU.

    ``masks`` is what every boolean is; ``example`` gives the numbers of a tensor that are known.
    """

    def __init__(self, *, masks: bool = False, example: Callable[[Tensor], Any] = lambda _: None) -> None:
        super().__init__()
        self._masks, self._example = masks, example
        self._generator = torch.Generator().manual_seed(0)

    def of(self, tensor: Tensor) -> Tensor:
        """Small positive numbers, or zeros for whole ones that nobody knows: they are valid indices."""
        if tensor.is_nested:
            return tensor  # made in this run: those of different lengths have no other form
        found = self._twins.get(id(tensor))
        if found is None:
            known = self._example(tensor)
            if isinstance(known, Tensor):
                made = known.clone()
            elif not tensor.is_meta and _is_whole(tensor):
                made = tensor.detach().cpu().clone()  # a buffer, or what code makes of numbers
            elif tensor.is_floating_point():
                made = torch.rand(tensor.shape, generator=self._generator).to(tensor.dtype)
            else:
                fill = int(self._masks and tensor.dtype == torch.bool)
                made = torch.full(tensor.shape, fill, dtype=tensor.dtype)
            found = tensor, made
            self._twins[id(tensor)] = found
            self._twins[id(made)] = made, made
        return found[1]

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.of(value)
            return CPU if isinstance(value, torch.device) else plain_number(value)

        args = tuple([map_structure(argument, arg) for arg in args])
        kwargs = {key: map_structure(argument, arg) for key, arg in kwargs.items()}
        name = getattr(function, "__name__", "")
        if kwargs.get("device") is not None or function in CONSTRUCTORS:
            kwargs["device"] = CPU
        elif name in MOVERS and args:
            return args[0]
        with torch.no_grad():
            result = function(*args, **kwargs)
        return map_structure(self._own, result)

    def value(self, tensor: Tensor, name: str = "item") -> Tensor:
        return self.of(tensor)

    def _own(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._twins[id(value)] = value, value
        return value


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
