"""Name the errors and warnings of a capture."""

from __future__ import annotations

import dis
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

__all__ = [
    "TRACE_ERRORS",
    "CaptureError",
    "CarriedOver",
    "HookError",
    "InputError",
    "Overwritten",
    "check_module",
    "failing_method",
    "first_line",
    "is_raised",
    "users_level",
    "where",
]

LIBRARY = str(Path(torch.__file__).parent) + os.sep
PACKAGE = str(Path(__file__).parent) + os.sep
PROJECT = str(Path(__file__).parents[1]) + os.sep


class CaptureError(RuntimeError):
    """A model, or one module of it, cannot be captured as a graph."""


class CarriedOver(CaptureError):
    """A module computes with what it wrote in an earlier call: its calls as a whole have no graph."""


class Overwritten(CaptureError):
    """A module overwrites parameters in each call; ``names`` are those of the parameters in it."""

    def __init__(self, names: tuple[str, ...], text: str = "") -> None:
        short = ", ".join(dict.fromkeys(repr(name.rpartition(".")[2]) for name in names))
        super().__init__(text or f"it overwrites {short} in each call, whatever that held")
        self.names = names


class InputError(ValueError):
    """A model does not accept its example inputs."""


class HookError(CaptureError):
    """A hook cannot be traced. Its module cannot stay whole instead: others may read what the hook keeps."""


# What a forward function may raise because it is being traced, or because its inputs do not fit.
TRACE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_module(value: object, argument: str = "model") -> None:
    """``TypeError`` for what is no module; a function or class that makes one is to be called.

    >>> check_module(nn.ReLU)
    Traceback (most recent call last):
    TypeError: model: expected a torch.nn.Module, got the class ReLU; call it: ReLU(...)
    """
    if isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule):
            raise TypeError(
                f"{argument}: got a module of torch.jit, which has no code to read; pass the one that it was"
                " made of"
            )
        return
    name = getattr(value, "__name__", "")
    if callable(value) and name:
        kind = "class" if isinstance(value, type) else "function"
        called = "pass what it returns" if name == "<lambda>" else f"call it: {name}(...)"
        raise TypeError(f"{argument}: expected a torch.nn.Module, got the {kind} {name}; {called}")
    hint = ""
    if isinstance(value, Mapping):
        hint = "; a state dict is loaded into a model first: model.load_state_dict(...)"
    elif isinstance(value, torch.export.ExportedProgram):
        hint = "; pass the module that was exported"
    elif isinstance(value, str):
        hint = "; build it first, as in timm.create_model(...)"
    raise TypeError(f"{argument}: expected a torch.nn.Module, got a {type(value).__name__}{hint}")


def first_line(error: BaseException) -> str:
    """Return an error's first line, without what some of PyTorch's errors append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    unknown = re.match(r"The register_meta function for (\S+) raises", text)
    return f"the shape of {unknown[1]} depends on the numbers in a tensor" if unknown else text


def failing_method(error: BaseException) -> tuple[nn.Module, str] | None:
    """The method, other than ``forward``, that a module called on itself or another one when the error came.

    The outermost one.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module):
            method = getattr(type(owner), code.co_name, None)
            if getattr(method, "__code__", None) is code and code.co_name != "forward":
                return owner, code.co_name
    return None


def is_raised(error: BaseException) -> bool:
    """Whether a statement (``raise`` or ``assert``) outside of this package raised an error.

    >>> def check():
    ...     raise ValueError("no")
    >>> try:
    ...     check()
    ... except ValueError as error:
    ...     is_raised(error)
    True
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    code = None if last is None else last.tb_frame.f_code
    if last is None or code is None or code.co_filename.startswith(PACKAGE):
        return False
    return dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def users_level() -> int:
    """Find the ``stacklevel`` with which the caller warns of the first line outside of this project.

    >>> users_level()
    1
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((LIBRARY, PROJECT)):
        frame, level = frame.f_back, level + 1
    return level


def where(error: BaseException, model: nn.Module, called: str = "") -> str:
    """The module of ``model`` whose code an error came from, and the line.

    If the error says neither, because capture itself raised it, that is the ``forward`` of the module
    ``called``.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    module, line = f"module {called!r}" if called else "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            module = f"module {paths[id(owner)]!r}"
        if not code.co_filename.startswith((LIBRARY, PACKAGE)):
            line = f"{code.co_filename}:{number}"
    written = getattr(type(model.get_submodule(called)).forward, "__code__", None)
    if not line and written is not None:
        line = f"{written.co_filename}:{written.co_firstlineno}"
    return ", ".join(part for part in (module, line) if part)
