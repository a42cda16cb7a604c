"""Find the objects that the code of a model can read and write.

The search starts at the model's modules. It follows attributes, the entries of containers, and the
functions that are called: their closures, their defaults, and the globals and class members that they name.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.capture.hooks import FORWARD_TABLES, GLOBAL_TABLES, KINDS, hook_name
from fxprune.capture.tracer.snapshots import Globals, plain_dict

__all__ = ["ATOMS", "CACHED", "TABLES", "Place", "Reachable", "applied_class", "is_generator"]

LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch", "numpy", "fxprune", "functorch", "triton",
    "pytest", "_pytest",  # which an assert in a test's model calls: they lead to all that the test run holds
}  # fmt: skip
WRAPPERS = ("collections", "queue", "weakref")
"""The modules of the standard library whose classes hold a collection of Python's own in an attribute."""
TABLES = ("_parameters", "_buffers", "_modules")
CACHED = functools._lru_cache_wrapper
SPECIAL = (CACHED, torch.jit.ScriptFunction)
COLLECTIONS = (dict, list, set, deque)
ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, type(None), range, slice, torch.Size, torch.dtype, torch.device)
)
BOUND = (BuiltinMethodType, MethodType)
EMPTIED = frozenset((dict, OrderedDict, set))
CREATORS = ("__init__", "__new__", "__post_init__", "__init_subclass__")


class Owner(NamedTuple):
    """The module at ``path`` whose attribute ``name`` leads to an object; ``path`` is None for globals.

    ``hook`` names the hook of the module that alone leads there.
    """

    path: str | None
    name: str | None
    hook: str = ""


class Container(NamedTuple):
    """Something that the code of a model can write: a collection, attributes, a closure's cell, a class,
    a module's globals or a random generator."""

    owner: Owner
    value: Any


@dataclass(frozen=True)
class Place:
    """A cached, scripted or autograd ``function``, and the entry ``key`` of ``holder`` that holds it."""

    holder: Any
    key: Any
    entry: Any
    function: Any


def _is_users(module: str) -> bool:
    """Whether a Python module is neither the standard library's nor PyTorch's."""
    return module.partition(".")[0] not in LIBRARIES


class Reachable:
    """List what the code of ``model`` reaches: ``containers`` it may write, ``places`` of special functions.

    A member of a class counts if a function that was reached mentions its name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.containers: list[Container] = []
        self.places: list[Place] = []
        modules = list(model.named_modules())
        self._paths = {id(module): path for path, module in modules}
        self._seen: dict[int, Any] = {}
        self._classes: set[tuple[type, bool]] = set()
        self._mentioned = {"forward"}
        self._unmentioned: dict[str, list[tuple[Owner, Any, Any]]] = {}
        self._attributes: deque[tuple[Owner, Any, Any, Any]] = deque()
        self._code: deque[tuple[Owner, Any, Any, Any]] = deque()
        for path, module in modules:
            self._visit(Owner(path, None), None, None, module)
        for kind, table in GLOBAL_TABLES.items():
            self._code.append((Owner("", kind), None, None, table))
        while self._attributes or self._code:
            # What an attribute leads to is called that, and not by the function that reads it.
            self._visit(*(self._attributes or self._code).popleft())

    def _visit(self, owner: Owner, holder: Any, key: Any, value: Any) -> None:
        kind = type(value)
        if kind in ATOMS or issubclass(kind, Tensor | ModuleType):
            return
        if kind in EMPTIED and not value:  # most of a module's tables of hooks
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self.containers.append(Container(owner, value))
            return
        function = _unwrapped(value)
        if isinstance(function, SPECIAL) or applied_class(function):
            self.places.append(Place(holder, key, value, function))
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if issubclass(kind, FunctionType):
            self._function(owner, value)
        elif issubclass(kind, type):
            self._class(owner, value, created=True)
        elif issubclass(kind, torch.Generator) or is_generator(kind):
            self.containers.append(Container(owner, value))
        else:
            self._object(owner, value)

    def _object(self, owner: Owner, value: Any) -> None:
        if issubclass(type(value), COLLECTIONS):
            self.containers.append(Container(owner, value))
        for key, item in _parts(value):
            inner = owner._replace(hook=hook_name(item)) if owner.name in KINDS and not owner.hook else owner
            self._attributes.append((inner, value, key, item))
        if not _has_attributes(value):
            return
        self._class(owner, type(value), created=False)
        attributes = vars(value)
        self.containers.append(Container(owner, attributes))
        self._seen[id(attributes)] = attributes
        own = isinstance(value, nn.Module) and id(value) in self._paths
        for name, item in list(attributes.items()):
            if type(item) in ATOMS:
                continue
            if own:
                owner = Owner(self._paths[id(value)], None if name in TABLES else name)
            later = own and name in FORWARD_TABLES
            (self._code if later else self._attributes).append((owner, attributes, name, item))

    def _class(self, owner: Owner, kind: type, *, created: bool) -> None:
        """Offer the members of a class; those that make an object of it only if it is ``created``."""
        for base in kind.__mro__:
            if not _is_users(base.__module__) or (base, created) in self._classes:
                continue
            if not {(base, True), (base, False)} & self._classes:
                self.containers.append(Container(owner, base))
            self._classes.add((base, created))
            for name, member in vars(base).items():
                if name in CREATORS:
                    called = created
                else:
                    called = name in self._mentioned or name.startswith("__")
                if called:
                    self._code.append((owner, base, name, member))
                elif name not in CREATORS:
                    self._unmentioned.setdefault(name, []).append((owner, base, member))

    def _function(self, owner: Owner, function: FunctionType) -> None:
        free = function.__code__.co_freevars
        for name, cell in zip(free, function.__closure__ or (), strict=True):
            self._seen.setdefault(id(cell), cell)
            self.containers.append(Container(owner, cell))
            for part in _parts(cell):
                self._code.append((_named(owner, name), cell, *part))
        for item in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._code.append((owner, None, None, item))
        for name, item in vars(function).items():
            self._code.append((owner, vars(function), name, item))
        known = function.__globals__
        if not _is_users(str(known.get("__name__", ""))):
            return
        names = set(_names(function.__code__))
        for name in sorted(names - self._mentioned):
            self._mentioned.add(name)
            for waiting, base, member in self._unmentioned.pop(name, ()):
                self._code.append((waiting, base, name, member))
        self._globals(known, names, owner.hook)

    def _globals(self, known: dict[str, Any], names: set[str], hook: str) -> None:
        """Visit the globals of these names, also those of modules among them."""
        key = id(known)
        if key not in self._seen:
            self._seen[key] = known
            self.containers.append(Container(Owner(None, None), Globals(known)))
        for name in sorted(names & known.keys()):
            value = known[name]
            if isinstance(value, ModuleType):
                inner = vars(value)
                if _is_users(value.__name__) and inner is not known:
                    self._globals(inner, names - {name}, hook)
            else:
                self._code.append((Owner(None, name, hook), known, name, value))


def _unwrapped(value: Any) -> Any:
    """The function in a static or class method or a property."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if type(value) is property else value


def _named(owner: Owner, name: str) -> Owner:
    return owner._replace(name=owner.name or name)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """The objects that an object of Python's own types holds, with the key or name that leads to each."""
    kind = type(value)
    if issubclass(kind, dict):
        yield from plain_dict(value).items()
    elif issubclass(kind, MappingProxyType):
        yield from value.items()
    elif issubclass(kind, list | tuple | deque | set | frozenset):
        yield from enumerate(list(value))
    elif issubclass(kind, CellType):
        with suppress(ValueError):  # empty
            yield "cell_contents", value.cell_contents
    elif issubclass(kind, MethodType):
        yield from (("__func__", value.__func__), ("__self__", value.__self__))
    elif issubclass(kind, BuiltinMethodType) and (is_generator(type(value.__self__)) or applied_class(value)):
        yield "__self__", value.__self__
    elif issubclass(kind, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif issubclass(kind, property):
        yield from (("fget", value.fget), ("fset", value.fset), ("fdel", value.fdel))
    elif issubclass(kind, staticmethod | classmethod | functools._lru_cache_wrapper):
        yield "__wrapped__", value.__wrapped__
    elif issubclass(kind, functools.cached_property):
        yield "func", value.func


def _has_attributes(value: Any) -> bool:
    """Whether an object keeps its state in attributes; those of foreign libraries are left alone."""
    kind = type(value)
    if kind is OrderedDict or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    own = kind.__module__ in WRAPPERS or kind is SimpleNamespace
    return own or _is_users(kind.__module__) or kind.__module__.startswith("torch.")


def applied_class(function: Any) -> type[torch.autograd.Function] | None:
    """Return the class whose ``apply`` a function is, if it was looked up before (``f = Own.apply``).

    >>> applied_class(print) is None
    True
    """
    kind = getattr(function, "__self__", None) if type(function) in BOUND else None
    own = isinstance(kind, type) and issubclass(kind, torch.autograd.Function)
    return kind if own and function.__name__ == "apply" else None


def is_generator(kind: type) -> bool:
    """Whether objects of this class draw random numbers from a state, as those of Python and numpy do.

    >>> is_generator(random.Random), is_generator(random.SystemRandom)
    (True, False)
    """
    if issubclass(kind, random.Random):
        return not issubclass(kind, random.SystemRandom)
    return str(kind.__module__).startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function, and the strings that may be such names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant
