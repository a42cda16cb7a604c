"""The rule table: which function writes the ops of which torch op.

A rule is ``rule(context, *args, **kwargs)`` with the op's own arguments, tensors replaced by values or
constants; it returns the op's result in the same form. Keys are functions, method names and module classes; a
duplicate raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxprune.capture.tracer.call_targets import AutogradCall
from fxprune.graph import ir
from fxprune.lowering.builder import Builder
from fxprune.lowering.constant import Constant
from fxprune.torch_private import OpOverload, OpOverloadPacket

__all__ = [
    "Context",
    "Rule",
    "RuleTable",
    "Rules",
    "Unknown",
    "describe",
    "described",
    "find_rule",
    "merge",
    "own_rules",
    "positional",
]

Rule = Callable[..., Any]


class Unknown(Exception):
    """Raised by a rule that meets arguments it cannot read; the op becomes opaque, with this text as the
    reason.
    """


@dataclass(frozen=True)
class Context:
    """Hold what a rule may look at: the builder, the fx node, its captured result, and the module of a
    call_module.
    """

    build: Builder
    node: fx.Node
    target: Any
    result: Any
    module: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (single) result."""
        if not isinstance(self.result, Tensor):
            raise Unknown(f"result of {self.node.name} is {type(self.result).__name__}, not a tensor")
        return tuple(self.result.shape)


class RuleTable:
    def __init__(self) -> None:
        self.rules: dict[Any, Rule] = {}

    def rule(self, *targets: Any) -> Callable[[Rule], Rule]:
        """Register the decorated function for every spelling of the op."""

        def register(function: Rule) -> Rule:
            for target in targets:
                if target in self.rules:
                    raise ValueError(f"op rule for {target!r} is defined twice")
                self.rules[target] = function
            return function

        return register


Rules = RuleTable | Mapping[Any, Rule]
"""Op rules that a user brings along."""


def merge(tables: Sequence[RuleTable]) -> dict[Any, Rule]:
    merged: dict[Any, Rule] = {}
    for table in tables:
        for target, function in table.rules.items():
            if target in merged:
                raise ValueError(f"op rule for {target!r} is defined in two files")
            merged[target] = function
    return merged


def own_rules(rules: Rules | None) -> dict[Any, Rule]:
    """Check a user's own rules and return them by target.

    Raises:
        TypeError: ``rules`` is no table, a target is no operation, or a rule is no function.
    """
    if rules is None:
        return {}
    if not isinstance(rules, (RuleTable, Mapping)):
        raise TypeError(f"rules: expected a RuleTable or a dict of target -> rule, got {rules!r}")
    found = dict(rules.rules if isinstance(rules, RuleTable) else rules)
    for target, rule in found.items():
        if not isinstance(target, str) and not callable(target):
            raise TypeError(
                f"rules: {target!r} is no operation; take a function, the name of a method or a module class"
            )
        if not callable(rule):
            raise TypeError(
                f"rules: the rule of {target!r} is {rule!r}; take a function rule(context, *args, **kwargs)"
            )
    return found


def find_rule(rules: Mapping[Any, Rule], target: Any) -> Rule | None:
    """Find the rule of a target; that of a library's operator goes by name, as "torchvision.roi_align"."""
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, AutogradCall):
        return rules.get(target) or rules.get(AutogradCall)
    return rules.get(target) or (rules.get(describe(target)) if is_operator(target) else None)


def is_operator(target: Any) -> bool:
    """Whether a target is an operator that a library has registered with torch."""
    return isinstance(target, OpOverloadPacket)


def described(error: Exception) -> str:
    """Name an error by its type and its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe(target: Any) -> str:
    """Name a target as people know it.

    >>> import torch
    >>> describe(torch.cosine_similarity), describe("masked_fill"), describe(torch.ops.aten.add)
    ('cosine_similarity', 'masked_fill', 'aten.add')
    """
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, str):
        return target
    name = str(target) if is_operator(target) else getattr(target, "__qualname__", repr(target))
    if "<locals>" in name:  # what a function made and gave another name, as PyTorch's dispatchers are
        name = target.__name__
    return name.removeprefix("_VariableFunctionsClass.")


OPERANDS = (
    ("condition", "input"),
    ("input", "other", "mat", "mat1", "batch1", "tensor1", "mat2", "vec", "vec2", "tensor", "exponent"),
    ("other", "mat2", "batch2", "tensor2", "vec"),
)
"""Names that PyTorch's functions give to their first operands, by place; rules have names of their own."""


def positional(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give leading operands by position that a call gives by name, as in ``torch.mm(x, mat2=y)``.

    >>> positional((1,), {"mat2": 3, "mat1": 2, "beta": 0})
    ((1, 2, 3), {'beta': 0})
    """
    given, rest = list(args), dict(kwargs)
    for names in OPERANDS[len(given) :]:
        name = next((name for name in names if name in rest), None)
        if name is None:
            break
        given.append(rest.pop(name))
    return tuple(given), rest


def tensors_in(x: Any) -> Iterator[ir.Value | Constant]:
    """Values and constants inside nested arguments, in order."""
    if isinstance(x, (ir.Value, Constant)):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_in(item)
    elif isinstance(x, dict):
        for item in x.values():
            yield from tensors_in(item)
    elif isinstance(x, slice):
        yield from tensors_in((x.start, x.stop, x.step))
    elif is_dataclass(x) and not isinstance(x, type):
        yield from tensors_in(list(vars(x).values()))


def substitute(x: Any, replace: Callable[[ir.Value | Constant], Any]) -> Any:
    """``x`` with every value and constant inside replaced."""
    if isinstance(x, (ir.Value, Constant)):
        return replace(x)
    made: Any = getattr(x, "_make", None)
    if isinstance(x, tuple) and made is not None:
        return made(substitute(item, replace) for item in x)
    if isinstance(x, (list, tuple)):
        return type(x)(substitute(item, replace) for item in x)
    if isinstance(x, dict):
        return {key: substitute(item, replace) for key, item in x.items()}
    if isinstance(x, slice):
        return slice(*(substitute(item, replace) for item in (x.start, x.stop, x.step)))
    return x
