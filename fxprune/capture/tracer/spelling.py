"""Names of operations: how what PyTorch reports becomes an fx node, and what a node may do besides its
result.

In: the functions that a ``TorchFunctionMode`` sees. Out: the op and target of the fx node for them, and
whether a node may be removed when nobody reads it.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.torch_private import device_constructors

__all__ = [
    "CONSTRUCTORS",
    "DRAWN_INTO",
    "DRAWS",
    "RANDOM",
    "RESHAPING",
    "VALUE_READERS",
    "called",
    "changes_input",
    "is_pure",
    "selects",
    "spelling",
]

# Functions that make tensors from nothing: they get the meta device while shapes are worked out.
CONSTRUCTORS: frozenset[Any] = frozenset(device_constructors())

# What asks for the numbers in a tensor.
VALUE_READERS = frozenset(
    (
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "item",
        "tolist",
        "numpy",
        "__array__",
        "__contains__",
    )
)

# In-place methods that change the shape.
RESHAPING = frozenset(
    (
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "squeeze_",
        "unsqueeze_",
        "resize_",
        "resize_as_",
        "as_strided_",
        "set_",
    )
)

# What `x + y` is called by the time that the mode sees it: written as an operator again.
OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "remainder": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__floordiv__": operator.floordiv,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__lshift__": operator.lshift,
    "__rshift__": operator.rshift,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
    "pow_": operator.ipow,
    "__iand__": operator.iand,
    "__ior__": operator.ior,
    "__ixor__": operator.ixor,
    "__ifloordiv__": operator.ifloordiv,
}
REFLECTED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rpow__": operator.pow,
    "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul,
    "__radd__": operator.add,
    "__rmul__": operator.mul,
    "__rand__": operator.and_,
    "__ror__": operator.or_,
    "__rxor__": operator.xor,
}
UNARY = frozenset(("neg", "__invert__"))
IN_PLACE_OPERATORS = frozenset(
    function
    for name, function in OPERATORS.items()
    if name.endswith("_") and function.__name__.startswith("i") and function is not operator.invert
) | {operator.setitem}

NAMED_AS_WRITING = frozenset((operator.and_, operator.or_, operator.not_, operator.is_))
"""Operators whose names end in an underscore because Python has their words."""

SELECTIONS = frozenset(("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2"))
"""Their results are as long as the numbers in a tensor say."""


def selects(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the result of a call is as long as numbers say: the entries where a mask holds."""
    name = getattr(function, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)
    return name in SELECTIONS or (name == "where" and len(args) == 1)


RANDOM = frozenset(
    (
        "alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "feature_alpha_dropout", "gumbel_softmax", "multi_head_attention_forward", "multinomial",
        "native_dropout", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
        "randn_like", "randperm", "rrelu", "scaled_dot_product_attention",
    )
)  # fmt: skip
DRAWN_INTO = frozenset(
    ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
)
"""Methods that write random numbers into their tensor."""
DRAWS = DRAWN_INTO | {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm",
}  # fmt: skip
"""What gives random numbers whatever it is told."""
EFFECTFUL = frozenset(
    (
        "_assert", "_assert_async", "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "manual_seed",
        "set_rng_state",
    )
)  # fmt: skip


def spelling(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, Any]:
    """The op, target and positional arguments of the fx node for a call that a mode saw."""
    name = getattr(function, "__name__", "")
    home = getattr(function, "__qualname__", "").partition(".")[0]
    if home not in ("Tensor", "TensorBase") or not hasattr(Tensor, name):
        return "call_function", function, args
    if not kwargs:
        if len(args) == (1 if name in UNARY else 3 if name == "__setitem__" else 2):
            if name in OPERATORS:
                return "call_function", OPERATORS[name], args
            if name in REFLECTED:
                return "call_function", REFLECTED[name], (args[1], args[0])
    return "call_method", name, args


def changes_input(node: fx.Node) -> bool:
    """Whether a node writes into its first argument (or into ``out``)."""
    if node.target in IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    if node.target in NAMED_AS_WRITING:
        return False
    if node.kwargs.get("out") is not None:  # F.normalize passes on ``out=None``
        return True
    name = called(node)
    if isinstance(node.target, FunctionType) and node.target.__module__ == "torch.nn.functional":
        where = _place_of_inplace(node.target)
        return (where is not None and node.args[where : where + 1] == (True,)) or name.endswith("_")
    return node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def called(node: fx.Node) -> str:
    """Return the name of what a node calls, without the room that it is in; "" if it has none.

    >>> graph = fx.Graph()
    >>> called(graph.call_function(torch.add, (1, 2))), called(graph.call_method("add_", (1, 2)))
    ('add', 'add_')
    """
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


@functools.cache
def _place_of_inplace(function: FunctionType) -> int | None:
    """Return the position at which a function takes ``inplace``, as in ``F.relu(x, True)``."""
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def is_pure(node: fx.Node) -> bool:
    """Whether a call may go when nobody reads its result: it does not write, draw or call the unknown."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or changes_input(node):
        return False
    name = called(node)
    if name in RANDOM or name in EFFECTFUL:
        return False
    if node.op == "call_method":
        return True
    if isinstance(node.target, type):
        return True
    module = str(getattr(node.target, "__module__", None) or "torch")
    return module.split(".")[0] in (
        "torch",
        "math",
        "_operator",
        "builtins",
        builtins.__name__,
        math.__name__,
    )
