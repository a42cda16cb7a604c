"""Follow conditions and numbers that traced code reads from its data, with the example's integers at hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.capture.errors import CaptureError
from fxprune.capture.tracer.meta_values import map_structure
from fxprune.capture.tracer.questions import Answer, Answers, if_finite
from fxprune.capture.tracer.spelling import called, is_pure
from fxprune.capture.tracer.traced_numbers import plain_number
from fxprune.torch_private import DisableTorchFunction, check_number

__all__ = ["Values", "is_any"]

SHAPED_LIKE = frozenset(
    (
        "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros",
        "ones_like", "zeros_like",
    )
)  # fmt: skip


class Values:
    """Tell the code on a tape what it asks of numbers in tensors.

    ``examples``: by the ``id`` of a meta tensor among the inputs, its numbers; ``answers`` has those to the
    questions that were settled. ``made_up`` stands for numbers that no example tells (None: these are asked
    for in vain); ``frozen``: what the
    model's own forward reads is a constant, with a check. ``reached``: the graph is looked at and not run, so
    code goes where there is something to do: a mask that chooses nothing, or an empty list, may be otherwise.
    """

    def __init__(
        self,
        answers: Answers | None = None,
        examples: Mapping[int, Tensor] = MappingProxyType({}),
        made_up: int | None = 1,
        frozen: bool = False,
        *,
        reached: bool = False,
    ) -> None:
        self.reached = reached
        self.answers = answers or Answers("the model")
        self.made_up, self.frozen = made_up, frozen
        self._examples = examples
        self._given: dict[fx.Node, Any] = {}

    def give(self, node: fx.Node, value: Any) -> None:
        """Note the numbers of an input, if all of its tensors have such."""
        found = map_structure(lambda x: self._examples.get(id(x)) if isinstance(x, Tensor) else x, value)
        if isinstance(found, Tensor | int | float) or (found and all(isinstance(x, Tensor) for x in found)):
            self._given[node] = found

    def truth(self, tape: Any, tensor: Tensor) -> bool:
        """Answer ``bool`` of a tensor, with a check in the graph."""
        node = tape.arg(tensor)
        if self.reached and is_any(node) and self.example(tape, node) is None:
            return True
        answer = self._answer(tape, node, "bool() asks for the numbers in a tensor", bool, (node,))
        self._check(tape, answer, tensor, torch.logical_not)
        return answer.value

    def compared(self, tape: Any, function: Callable[..., Any], args: tuple[Any, Any]) -> bool:
        """Answer a comparison of a number that was read from data, with a check in the graph."""
        if (
            self.reached
            and plain_number(args[1]) == 0
            and function in (operator.eq, operator.ne, operator.gt)
        ):
            return function is not operator.eq
        node = tape.node("call_function", function, args, {})
        text = "a comparison of lengths asks for the numbers in a tensor: they decide a length"
        answer = self._answer(tape, node, text, function, node.args)
        node.meta["val"] = answer.value
        self._check(tape, answer, node, operator.not_)
        return answer.value

    def _answer(
        self, tape: Any, node: fx.Node, text: str, function: Callable[..., Any], operands: Any
    ) -> Answer:
        """Answer the question for ``function(*operands)``, which ``node`` stands for."""

        def known(*, shapes: bool) -> bool | None:
            found = [self.example(tape, item, shapes=shapes) for item in operands]
            return None if any(x is None for x in found) else bool(function(*found))

        return self.answers.to(node, text, if_finite(node), known(shapes=True), known(shapes=False))

    def read(self, tape: Any, tensor: Tensor, name: str) -> Any:
        """Numbers of a tensor, which the graph reads anew; those of the example, or made-up ones.

        Raises:
            CaptureError: they become plain numbers, and no example tells them, or a submodule asks.
        """
        if name == "item" and tensor.dtype == torch.bool:
            return self.truth(tape, tensor)
        node = tape.arg(tensor)
        example, plain = self.example(tape, node), name not in ("item", "tolist")
        if plain or (self.frozen and tape.scope.parent is None):
            if example is None or not self._may_freeze(tape, node):
                raise CaptureError(f"{name.strip('_')}() asks for the numbers in a tensor")
            found = example.tolist()
            self.freeze(tape, tape.read("tolist", tensor, found), found)
            return found
        known = example is not None
        number = self.made_up is not None and tensor.dtype != torch.bool and not tensor.is_complex()
        number = number or (self.reached and tensor.is_floating_point())
        if not known and (name == "tolist" or not number):
            raise CaptureError(f"{name}() asks for the numbers in a tensor")
        made_up = float(self.made_up or self.reached) if tensor.is_floating_point() else self.made_up
        return tape.numbers(tape.read(name, tensor, example.tolist() if known else made_up))

    def made_plain(self, tape: Any, number: Any) -> None:
        """Check that a number which was read, and of which code makes a plain one, is that of the example.

        Raises:
            CaptureError: no example tells it, or a submodule asks.
        """
        example = self.example(tape, number.node)
        if example is None or not self._may_freeze(tape, number.node):
            raise CaptureError("int() asks for the numbers in a tensor")
        self.freeze(tape, number.node, plain_number(number))

    def _may_freeze(self, tape: Any, node: fx.Node) -> bool:
        """Whether a number may hold for the example alone: a submodule could rather stay whole."""
        return tape.scope.parent is None or self.example(tape, node, shapes=True) is not None

    def freeze(self, tape: Any, node: fx.Node, found: Any) -> None:
        """Make the graph raise where a node gives something else."""
        same = tape.node("call_function", operator.eq, (node, found), {})
        same.meta["val"] = True
        tape.effect(check_number, (same, self.answers.frozen(found)))

    def _check(self, tape: Any, answer: Answer, condition: Any, negated: Callable[..., Any]) -> None:
        """Make the graph raise where an answer does not hold; one that is on trial needs no check."""
        if not answer.told:
            return
        if not answer.value:
            node = tape.node("call_function", negated, (condition,), {})
            tensor = isinstance(condition, Tensor)
            node.meta["val"] = tape.shadows.run(negated, (condition,), {}) if tensor else True
            condition = node
        tape.effect(check_number, (condition, answer.told))

    def example(self, tape: Any, last: Any, *, shapes: bool = False) -> Any:
        """Compute a node for the example's integers; None if it depends on other numbers.

        ``shapes``: only if no input's numbers matter, but its shape does.
        """
        if not isinstance(last, fx.Node):
            return last
        values: dict[fx.Node, Any] = {}
        pending = [last]
        with DisableTorchFunction(), torch.no_grad():
            while pending:
                node = pending[-1]
                missing = [part for part in _needed(node) if part not in values]
                if missing:
                    pending += missing
                    continue
                pending.pop()
                known = self._computed(tape, node, values, shapes)
                if known is None:
                    return None
                values[node] = known
        return values[last]

    def _computed(self, tape: Any, node: fx.Node, values: dict[fx.Node, Any], shapes: bool) -> Any:
        if node.op == "placeholder":
            return None if shapes else self._given.get(node)
        if node.op == "get_attr":
            return tape.constants.get(str(node.target), tape.integers.get(str(node.target)))
        if _is_size(node):
            asks = node.args[0] in tape.unsized and node.args[1:] not in (("device",), ("dtype",), ("ndim",))
            return None if asks else node.meta["val"]
        if not is_pure(node):
            return None
        known = dict(values)
        for part in _shaped(node):
            known[part] = torch.zeros(part.meta["val"].shape, dtype=part.meta["val"].dtype)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        args, kwargs = map_structure(_plain, args), map_structure(_plain, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_size(node: fx.Node) -> bool:
    """Whether a node reads the shape of a tensor."""
    name = called(node)
    reads_shape = node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    return reads_shape or (node.op == "call_method" and name in ("size", "dim", "numel"))


def _shaped(node: fx.Node) -> list[fx.Node]:
    """The tensor that a node reads the shape and type of alone."""
    name = called(node)
    first = node.args[0] if node.args else None
    return [first] if name in SHAPED_LIKE and isinstance(first, fx.Node) else []


def _needed(node: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers a node needs."""
    if _is_size(node):
        return []
    return [part for part in node.all_input_nodes if part not in _shaped(node)]


def is_any(node: Any) -> bool:
    """Whether a condition asks whether any entry of a mask holds.

    >>> graph = fx.Graph()
    >>> is_any(graph.call_method("any", (graph.placeholder("mask"),)))
    True
    """
    name = called(node)
    return name == "any" and len(node.args) == 1


def _plain(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    return dtype if dtype is not None and not isinstance(value, Tensor) else plain_number(value)
