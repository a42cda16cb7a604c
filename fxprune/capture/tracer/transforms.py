"""Record what runs under the transforms of ``torch.func``: vmap, grad, jvp and those made of them.

Under a transform the traced code holds wrapped tensors, which are no nodes. Beneath all transforms PyTorch
calls operators on plain ones: these go on the tape, by their public names. The graph then has no transform
left, but batched products and the like.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from fxprune.capture.tracer.meta_values import META
from fxprune.capture.tracer.overloads import first_result, public_call
from fxprune.capture.tracer.recorder import Recorder
from fxprune.capture.tracer.replacing import replaced
from fxprune.capture.tracer.spelling import RESHAPING, spelling
from fxprune.capture.tracer.traced_numbers import TracedInt, plain_number
from fxprune.torch_private import DisableTorchFunction, TorchDispatchMode

__all__ = ["Beneath", "nesting", "regrouped", "wrapping"]

FROM_OWN = frozenset(("view", "reshape", "expand"))
FROM_NONE = frozenset(("new_zeros", "new_ones", "new_empty", "new_full"))
"""Methods that take sizes, as a list: those of the tensor in other groups, or any."""


class Beneath(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts operators on the tape of ``recorder``.

    ``sizes``: those that vmap runs over, where they follow the inputs.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.sizes: list[TracedInt] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tape = self.recorder.tape
        with DisableTorchFunction(), self.recorder.resumed():
            found = self.call(*public_call(func, args, kwargs or {}))
            first = first_result(func, args, kwargs or {})
            if first is not None:
                tape.rename(found[0], self.call(*first))
            return found

    def call(self, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run a call in shapes, and record it."""
        tape = self.recorder.tape
        own = {**options, "device": META} if "device" in options else options
        op, target, operands = spelling(function, args, options)
        if target in RESHAPING:
            tape.keep_shape(args[0])
        out = function(*args, **own)
        if target in FROM_OWN and tuple(out.shape) == tuple(args[0].shape):
            tape.rename(out, args[0])
            return out
        if options.get("device") == META:
            options = {**options, "device": self.recorder.device}
        return tape.record(op, target, self.followed(target, operands), options, out)

    def followed(self, target: Any, operands: Any) -> Any:
        """The operands of a call with the sizes among them computed from those of the inputs, where they
        can be."""
        if target not in (*FROM_OWN, *FROM_NONE) or not isinstance(operands[1], list | tuple):
            return operands
        tensor, sizes, *others = operands
        looped = next((x for x in self.sizes if list(sizes[:1]) == [plain_number(x)]), None)
        if target == "expand":
            own = [None] * (len(sizes) - tensor.dim()) + list(tensor.shape)
            followed = [-1 if size == known else size for size, known in zip(sizes, own, strict=True)]
        elif target in FROM_OWN and self.recorder.tape.find(tensor) is not None:
            followed = regrouped(self.recorder.tape.shape(tensor), sizes)
        else:
            followed = list(sizes)
        if looped is not None and type(followed[0]) is int and followed[0] > 0:
            followed[0] = looped
        return tensor, followed, *others


def regrouped(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """New sizes computed from old ones: axes that are merged are multiplied, and of an axis that is split the
    first part is divided.

    >>> regrouped((2, 3, 8), (6, 4, 2))
    [6, 4, 2]
    """
    result: list[int] = []
    ahead = list(shape)
    place = 0
    while place < len(sizes):
        group, known = [sizes[place]], ahead[:1]
        place, ahead = place + 1, ahead[1:]
        while math.prod(group) != (size := math.prod(map(plain_number, known))):
            if math.prod(group) < size and place < len(sizes):
                group, place = [*group, sizes[place]], place + 1
            elif math.prod(group) > size and ahead:
                known, ahead = [*known, ahead[0]], ahead[1:]
            else:
                return list(sizes)  # a size is zero, or to be worked out
        first = functools.reduce(operator.mul, known) if known else 1
        rest = math.prod(group[1:])
        result += [first if rest == 1 else first // rest, *group[1:]]
    return result


def nesting(recorder: Recorder, original: Callable[..., Any]) -> Callable[..., AbstractContextManager[Any]]:
    """Stand in for a context that opens one level of a transform."""

    @contextmanager
    def level(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(replaced(recorder, "transformed", True))
            if recorder.recording:
                beneath = stack.enter_context(Beneath(recorder))
                stack.enter_context(replaced(recorder, "beneath", beneath))
                stack.enter_context(recorder.paused())
            if recorder.beneath is not None and isinstance(args[0] if args else None, TracedInt):
                sizes = [args[0], *recorder.beneath.sizes]
                stack.enter_context(replaced(recorder.beneath, "sizes", sizes))
            yield stack.enter_context(original(*map(plain_number, args), **kwargs))

    return level


def wrapping(recorder: Recorder, original: Callable[..., Any]) -> Callable[..., Any]:
    """Stand in for a function that wraps a tensor: of a tensor of the model, it wraps the shape."""

    def wrap(tensor: Any, *args: Any) -> Any:
        with DisableTorchFunction():
            return original(recorder.twin(tensor) if recorder.transformed else tensor, *args)

    return wrap
