"""Answer what traced code asks about numbers, where all but one answer end in an error.

In: a condition that shapes do not decide. Out: the answer with which the code goes on, and a node that raises
where it does not hold. A condition is answered in this order of rules:

1. What follows from the sizes of the inputs and from constants is computed; numbers that come out of layers
   are finite (asked by ``isfinite``, ``isnan``, ``isinf`` or ``x != x``).
2. The code is run on from there with either answer. Where one of them makes it raise before it calls a
   module, asks again or returns, as an argument check does, the other one holds.
3. In the model's own ``forward``, which cannot stay whole and has no other way for compilers: the answer that
   the example's integers give.

Anything else differs from one ordinary input to the next: the module that asks stays whole.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor, fx

from fxprune.capture.errors import LIBRARY, PACKAGE, CaptureError
from fxprune.capture.tracer.spelling import called

__all__ = ["Answer", "Answers", "Question", "TrialOver", "if_finite"]

Place = tuple[tuple[CodeType, int], ...]
"""The calls that lead from the ``forward`` of a module to where its code asks."""

FINITE = {"isfinite": True, "isnan": False, "isinf": False, "isposinf": False, "isneginf": False}
KEPT = frozenset(
    (
        "all", "amax", "amin", "any", "bool", "clone", "cpu", "detach", "flatten", "item", "max", "min",
        "reshape", "to", "view", "_is_all_true", "_is_any_true",
    )
)  # fmt: skip
NEGATED = frozenset(("logical_not", "invert", "bitwise_not", "not_", "__invert__"))
AND = frozenset(("logical_and", "and_", "bitwise_and", "__and__"))
OR = frozenset(("logical_or", "or_", "bitwise_or", "__or__"))
BOUNDED = frozenset(("clamp", "exp", "linear", "matmul", "nan_to_num", "sigmoid", "softmax", "tanh"))


class Question(BaseException):
    """Traced code asks at ``place``; no error, so that code which catches errors does not catch this."""

    def __init__(self, place: Place, text: str, example: bool | None) -> None:
        super().__init__(text)
        self.place, self.text, self.example = place, text, example


class TrialOver(BaseException):
    """The code went on with the answer on trial."""


@dataclass(frozen=True)
class Answer:
    """``value`` holds; ``told`` is the error of the graph where it does not."""

    value: bool
    told: str


class Answers:
    """The answers found so far, for all traces of one capture of a model of class ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_example = False
        self._errors: dict[Place, tuple[bool, str]] = {}
        self._by_example: set[Place] = set()
        self._open: set[Place] = set()
        self._told = False
        self._assumed: dict[Place, bool] = {}
        self._trial: tuple[Place, bool] | None = None
        self._answered: Any = None
        self._made_up = False

    @property
    def on_trial(self) -> bool:
        """Whether the code runs with an answer that is only tried."""
        return self._answered is not None

    def to(
        self,
        condition: fx.Node,
        text: str,
        finite: bool | None,
        sizes: bool | None,
        example: bool | None,
    ) -> Answer:
        """Answer what the code that called asks.

        Args:
            condition: the node that is asked about.
            text: the question, as an error is to say it.
            finite: the answer where all numbers are finite, if that decides.
            sizes: the answer that the sizes of the inputs give, if they do.
            example: the answer that the example's integers give, if they do.

        Raises:
            CaptureError: there is none.
            Question: there is none yet.
            TrialOver: another question was on trial.
        """
        place = _place()
        if self._trial is not None and not self.on_trial and self._trial[0] == place:
            self._answered = condition
        if self._trial is not None and self._answered is condition:
            return Answer(self._trial[1], "")  # "not (a and b)" asks for the truth of one of them twice
        if finite is not None:
            return self._answer(place, finite, "asks whether numbers are finite, and some are not")
        if sizes is not None:
            return self._answer(place, sizes, "decides by the sizes of the inputs; capture it for these")
        if place in self._assumed:
            return Answer(self._assumed[place], "")
        if place in self._errors:
            answer, told = self._errors[place]
            return self._answer(place, answer, told)
        if place in self._by_example and example is not None:
            told = "decides by numbers in the inputs, and was captured with others; capture it for these"
            return self._answer(place, example, told)
        self.went_on()
        if place in self._open:
            raise CaptureError(text)
        raise Question(place, text, example)

    def made_up(self, numbers: Tensor) -> Tensor:
        """Give made-up numbers to the code that is on trial; its error will not be quoted."""
        self._made_up = True
        return numbers

    def went_on(self) -> None:
        """Tell that the code did something else than to raise.

        Raises:
            TrialOver: an answer was on trial.
        """
        if self.on_trial:
            raise TrialOver

    @contextmanager
    def trial(self, question: Question, answer: bool) -> Iterator[None]:
        """Inside, ``question`` has ``answer``."""
        before = self._trial, self._answered
        self._trial, self._answered, self._made_up = (question.place, answer), None, False
        try:
            yield
        finally:
            self._trial, self._answered = before

    def settle(self, question: Question, errors: dict[bool, Exception | None], *, by_example: bool) -> None:
        """Note the answer to ``question``, or that there is none: both are possible, or neither.

        ``errors`` are those that the code raises after either answer.
        """
        raising = [answer for answer, error in errors.items() if error is not None]
        if len(raising) == 1:
            error = errors[raising[0]]
            told = "" if self._made_up else ": " + " ".join(str(error).split())[:150]
            self._errors[question.place] = not raising[0], f"raises {type(error).__name__}{told}"
        elif not raising and by_example and question.example is not None:
            self._by_example.add(question.place)
        else:
            self._open.add(question.place)
            self._told |= question.example is not None

    def take_example(self) -> bool:
        """Let the example answer from now on what is open; whether that is new and may help."""
        if self.by_example or not self._told:
            return False
        self.by_example = True
        self._open.clear()
        return True

    def is_open(self, question: Question) -> bool:
        """Whether ``question`` was settled without an answer."""
        return question.place in self._open

    def assume(self, question: Question, answer: bool | None) -> None:
        """Answer ``question`` so from now on, without a check: in a graph that is looked at and not run.

        With None there is no answer again.
        """
        self._assumed.pop(question.place, None)
        if answer is not None:
            self._assumed[question.place] = answer

    def frozen(self, found: Any) -> str:
        """Say that the graph holds for these numbers only, which the code that called reads."""
        shown = str(found)[:60]
        return (
            f"{self.name}: {_line(_place())} makes a Python number of numbers in the inputs, and was captured"
            f" with {shown}; capture it again for these, or prune with returns='module', which takes any"
        )

    def _answer(self, place: Place, value: bool, told: str) -> Answer:
        return Answer(value, f"{self.name}: {_line(place)} {told}")


def _place() -> Place:
    """The frames between the code that asks and the innermost ``forward``, without capture's own."""
    frame = sys._getframe(1)
    calls: list[tuple[CodeType, int]] = []
    while frame is not None:
        code = frame.f_code
        own = code.co_filename.startswith(PACKAGE)
        if own and code.co_name == "inside":
            break
        if not own:
            calls.append((code, _step(code, frame.f_lasti)))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(calls)


def _step(code: CodeType, offset: int) -> int:
    """The first of the instructions side by side that do one thing.

    Python takes others of them as it learns of types, so that the offset alone differs from call to call.
    Python 3.10 does not learn, and knows no places within a line.
    """
    index = max(0, offset) // 2
    if sys.version_info < (3, 11):
        return index
    positions = list(code.co_positions())
    while index > 0 and positions[index - 1] == positions[index]:
        index -= 1
    return index


def _line(place: Place) -> str:
    """The file and line of the user's code that asks; of the innermost code if all of it is PyTorch's."""
    code, step = next((call for call in place if not call[0].co_filename.startswith(LIBRARY)), place[0])
    line = next((line for start, end, line in code.co_lines() if start <= 2 * step < end), None)
    return f"{Path(code.co_filename).name}:{line or code.co_firstlineno}"


def if_finite(node: Any) -> bool | None:
    """The truth of a condition if all numbers are finite; None where that does not decide it.

    >>> graph = fx.Graph()
    >>> weights = graph.get_attr("weight")
    >>> if_finite(graph.call_method("any", (graph.call_method("isnan", (weights,)),)))
    False
    """
    if isinstance(node, bool):
        return node
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = called(node)
    if name in FINITE:
        return FINITE[name] if _is_computed(node.args[0], infinite="inf" in name or "fin" in name) else None
    if node.target in (operator.ne, operator.eq) and node.args[0] is node.args[1]:
        return node.target is operator.eq if _is_computed(node.args[0], infinite=False) else None
    if name in KEPT and not any(isinstance(item, fx.Node) for item in node.args[1:]):
        return if_finite(node.args[0])
    if name in NEGATED:
        part = if_finite(node.args[0])
        return None if part is None else not part
    if name in AND or name in OR:
        parts, decisive = [if_finite(part) for part in node.args[:2]], name in OR
        return decisive if decisive in parts else None if None in parts else not decisive
    return None


def _is_computed(last: Any, *, infinite: bool) -> bool:
    """Whether numbers come out of layers: inputs may well not be finite.

    ``infinite``: nor may the code itself have put infinities among them, as into a mask, unless something
    has made them finite since.
    """
    pending, seen, computed = [last], set(), False
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op in ("call_module", "get_attr") or called(node) in BOUNDED:
            computed = True
            continue
        numbers = (*node.args, *node.kwargs.values())
        if infinite and any(isinstance(item, float) and math.isinf(item) for item in numbers):
            return False
        pending += node.all_input_nodes
    return computed
