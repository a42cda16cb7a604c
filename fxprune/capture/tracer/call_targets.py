"""Targets of call_function nodes for what has no name of its own: autograd functions, scripts, objects,
methods."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from fxprune.capture.errors import CaptureError

__all__ = ["AutogradCall", "MethodCall", "ObjectOf", "ScriptedCall"]


class AutogradCall:
    """Calls ``function_class.apply``. Equal to another one of the same class; pickled by the class."""

    def __init__(self, function_class: Any) -> None:
        self.function_class = function_class
        self.__name__ = "apply"
        self.__qualname__ = f"{function_class.__qualname__}.apply"
        home = str(function_class.__module__)
        # The code of a graph calls what is in torch by its name, and takes it for free of side effects.
        self.__module__ = __name__ if home.partition(".")[0] == "torch" else home

    def __call__(self, *args: Any) -> Any:
        return self.function_class.apply(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutogradCall) and self.function_class is other.function_class

    def __hash__(self) -> int:
        return hash(self.function_class)

    def __reduce__(self) -> tuple[Any, ...]:
        return AutogradCall, (self.function_class,)


class MethodCall:
    """Calls a method of a module that reads its plain attributes alone: no parameters, no submodules."""

    def __init__(self, kind: type[nn.Module], name: str, attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes
        self.__name__, self.__qualname__ = name, f"{kind.__qualname__}.{name}"
        self.__module__ = kind.__module__

    @classmethod
    def of(cls, module: nn.Module, name: str) -> MethodCall:
        """The method ``name`` of ``module``."""
        own = vars(nn.Module()).keys() - {"training"}
        return cls(type(module), name, {key: value for key, value in vars(module).items() if key not in own})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shell: Any = object.__new__(self.kind)
        nn.Module.__init__(shell)
        vars(shell).update(self.attributes)
        return getattr(self.kind, self.__name__)(shell, *args, **kwargs)

    def _key(self) -> tuple[Any, ...]:
        return self.kind, self.__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodCall) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return MethodCall, (self.kind, self.__name__, self.attributes)


class ObjectOf:
    """Makes an object of ``kind`` with the given attributes, without calling its constructor."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = kind.__qualname__
        self.__module__ = kind.__module__

    def __call__(self, **attributes: Any) -> Any:
        try:
            made: Any = object.__new__(self.kind)
        except TypeError as error:  # made in C, such as the storage of a tensor
            raise CaptureError(f"it keeps a {self.kind.__name__}, which a graph cannot") from error
        vars(made).update(attributes)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectOf) and self.kind is other.kind

    def __hash__(self) -> int:
        return hash(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectOf, (self.kind,)


class ScriptedCall:
    """Calls a ``torch.jit.script`` function, which knows its own name no longer; pickled by where it was
    found."""

    def __init__(self, module: str, name: str, function: Any = None) -> None:
        self.function = function or getattr(importlib.import_module(module), name)
        self.__name__ = self.__qualname__ = name
        self.__module__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScriptedCall) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.__qualname__)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScriptedCall:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ScriptedCall, (self.__module__, self.__name__)
