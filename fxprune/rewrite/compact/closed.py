"""Call modules that stay whole several times: with smaller layers in them they must do what they did.

Such a module computes with what an earlier call of it wrote, and may do something else in training: one run
in evaluation says nothing of either.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.rewrite.compact.trial import RUN_ERRORS, NodeFailure, difference
from fxprune.rewrite.compact.unchecked import Unchecked
from fxprune.torch_private import pytree

__all__ = ["check_calls"]

TOLERANCE = 1e-4
"""Of the largest entry, in the numbers' own type; entries of other channels differ by more."""

TRAINING_TOLERANCE = 1e-3
"""The same in training, where batch norms of few numbers enlarge what is rounded."""


def check_calls(
    gm: fx.GraphModule, small: fx.GraphModule, paths: Collection[str], inputs: Sequence[Any]
) -> None:
    """Raise `NodeFailure` where a module of ``small``, called again or in training, is not as that of ``gm``.

    ``paths``: modules that both graphs call as a whole, and that hold smaller layers in ``small``. A call
    that fails in ``gm`` too, as that of a batch norm on a single number in training, says nothing; of one
    that draws random numbers in training, as dropout does, the sizes are compared there and not the numbers.
    """
    if not paths:
        return
    before, after = (_calls(network, paths, inputs) for network in (gm, small))
    drawn = dict[str, _Calls]()
    for node in before.keys() & after.keys():
        error = _what_differs(before[node], after[node])
        if error is None and not _trains_alike(before[node], after[node]):
            drawn = drawn or _calls(gm, paths, inputs, seed=1)
            if _trains_alike(before[node], drawn[node]):  # and no dropout
                error = ValueError("in training it gives other numbers")
        if error is not None:
            raise NodeFailure(node, error) from error


@dataclass(frozen=True, eq=False)
class _Calls:
    """Holds what a module gave in training, or its error, and what it gave in evaluation after that."""

    trained: Any
    again: Any


def _what_differs(old: _Calls, new: _Calls) -> Exception | None:
    trains = not isinstance(old.trained, Exception)
    if trains and isinstance(new.trained, Exception):
        return new.trained
    if _sizes(old.again) != _sizes(new.again):
        return None  # it gives fewer channels; the nodes that read them are compared
    if trains and _sizes(old.trained) != _sizes(new.trained):
        return ValueError("in training it gives other sizes")
    if not difference(old.again, new.again) <= TOLERANCE:
        return ValueError("called again it gives other numbers")
    return None


def _trains_alike(one: _Calls, other: _Calls) -> bool:
    """Whether two modules give the same numbers in training, or not the same sizes or none at all."""
    if any(isinstance(calls.trained, Exception) for calls in (one, other)):
        return True
    if _sizes(one.trained) != _sizes(other.trained):
        return True
    return difference(one.trained, other.trained) <= TRAINING_TOLERANCE


def _sizes(result: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _calls(
    gm: fx.GraphModule, paths: Collection[str], inputs: Sequence[Any], seed: int = 0
) -> dict[str, _Calls]:
    several = _SeveralCalls(gm, paths, seed)
    with torch.no_grad():
        several.run(*inputs)
    return several.found


class _SeveralCalls(Unchecked):
    """Calls the modules at ``paths`` in evaluation, in training and in evaluation again."""

    def __init__(self, gm: fx.GraphModule, paths: Collection[str], seed: int) -> None:
        super().__init__(gm, seed)
        self.paths = paths
        self.found: dict[str, _Calls] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and str(n.target) in self.paths:
            self.found[n.name] = _Calls(self._trained(n), super().run_node(n))
        return result

    def _trained(self, n: fx.Node) -> Any:
        module = self.module.get_submodule(str(n.target))
        modes = [(part, part.training) for part in module.modules()]
        module.train()
        try:
            return super().run_node(n)
        except RUN_ERRORS as error:
            return error
        finally:
            for part, mode in modes:
                part.training = mode
