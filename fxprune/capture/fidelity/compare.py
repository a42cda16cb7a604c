"""Two traces of one model, side by side.

In: traces made in different modes, with different batch sizes or in different precision. Out: the modules in
which they did different things, and the constants in which they differ though they did the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.capture.tracer.entries import DtypeOf, Scope
from fxprune.capture.tracer.memos import first_writes
from fxprune.capture.tracer.spelling import is_pure
from fxprune.capture.tracer.trace import Trace
from fxprune.torch_private import pytree

__all__ = [
    "ConstantTensor",
    "Differences",
    "align_calls",
    "compare",
    "computes_same",
    "equal_tensors",
    "same_but_for_numbers",
    "take_regions",
]


@dataclass
class ConstantTensor:
    """A constant argument of ``node``, ``first`` in one trace and ``second`` in the other; ``key`` leads
    to it."""

    node: fx.Node
    path: str
    key: tuple[Any, ...]
    first: Any
    second: Any


@dataclass
class Differences:
    """``modules``: the innermost modules that did something else ("" is the model itself).

    ``pairs`` maps the nodes of the second trace to those of the first one.
    """

    modules: set[str] = field(default_factory=set)
    constants: list[ConstantTensor] = field(default_factory=list)
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.modules or self.constants)

    @property
    def places(self) -> set[str]:
        """The modules in which anything differs."""
        return self.modules | {constant.path for constant in self.constants}


def compare(first: Trace, second: Trace) -> Differences:
    """List the differences of ``second`` from ``first``.

    Example:
        >>> from fxprune.capture.tracer.trace import trace
        >>> net, x = torch.nn.Sequential(torch.nn.ReLU()), torch.ones(2, device="meta")
        >>> bool(compare(trace(net, (x,), {}, training=True), trace(net, (x,), {}, training=False)))
        False
    """
    comparison = _GraphPair(first, second)
    comparison.scopes(first.scope, second.scope)
    return comparison.found


def computes_same(first: Trace, second: Trace) -> bool:
    """Whether two traces are the same but for nodes that nobody needs."""
    comparison = _GraphPair(first, second)
    mine, other = (
        [node for node in trace.graph.nodes if node in needed and node.op != "get_attr"]
        for trace, needed in ((first, _needed(first.graph)), (second, _needed(second.graph)))
    )
    if [_key(node) for node in mine] != [_key(node) for node in other]:
        return False
    comparison.found.pairs.update(zip(other, mine, strict=True))
    for a, b in zip(mine, other, strict=True):
        comparison.nodes(comparison.scope_of.get(a, first.scope), a, b)
    return not comparison.found


def computes_same_apart_from_order(first: Trace, second: Trace) -> bool:
    """Whether two traces do the same, though what has no effect but its result may stand elsewhere."""
    comparison = _GraphPair(first, second)
    mine, other = (
        [node for node in trace.graph.nodes if not is_pure(node) and not _fills(node)]
        for trace in (first, second)
    )
    if len(mine) != len(other) or not all(map(comparison.pair, mine, other)):
        return False
    for b, a in list(comparison.found.pairs.items()):
        comparison.nodes(comparison.scope_of.get(a, first.scope), a, b)
    return not comparison.found


def same_but_for_numbers(first: Trace, second: Trace) -> bool:
    """Tell whether two traces of the same inputs make the same tensors, whatever remembers its numbers.

    A number that one of them has as it was here may be computed in the other, as long as it is the same.
    """
    pairs: dict[fx.Node, fx.Node] = {}
    mine, other = (
        [node for node in trace.graph.nodes if node.op != "get_attr" and _acts(node)]
        for trace in (first, second)
    )
    if list(map(_key, mine)) != list(map(_key, other)):
        return False

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == b.op == "get_attr":
            known = first.constants.get(str(a.target)), second.constants.get(str(b.target))
            return equal_tensors(*known) if known != (None, None) else a.target == b.target
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and pairs.get(a) is b:
            return True
        a, b = (x.meta.get("val") if isinstance(x, fx.Node) else x for x in (a, b))
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, slice) and isinstance(b, slice):
            return all(same(getattr(a, part), getattr(b, part)) for part in ("start", "stop", "step"))
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and _equal(a, b)

    for a, b in zip(mine, other, strict=True):
        if not same((a.args, a.kwargs), (b.args, b.kwargs)):
            return False
        pairs[a] = b
    return True


def _acts(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or has an effect."""
    return not is_pure(node) or any(isinstance(x, Tensor) for x in pytree.tree_leaves(node.meta.get("val")))


def _align_entries(a: Scope, b: Scope) -> Iterator[tuple[list[Any], list[Any]]]:
    """The entries of two scopes in order: runs of equal ones pairwise, and what only one of them has."""
    yield from _aligned(a.entries, b.entries, _key)


def align_calls(a: Scope, b: Scope) -> Iterator[tuple[list[Any], list[Any]]]:
    """The same, calls of modules first, then what makes tensors, and last of all the numbers between them.

    The members that are picked count: two modes that differ pick other members of the same results.
    """
    yield from _aligned_in_steps(a.entries, b.entries, ((_is_call, _key), (_makes_tensors, _key_with_member)))


def _aligned_in_steps(
    first: list[Any], second: list[Any], steps: Sequence[tuple[Callable[[Any], bool], Callable[[Any], Any]]]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Align the entries that the first step picks by its key, and what is between them in the other steps."""
    if not steps or list(map(_key_with_member, first)) == list(map(_key_with_member, second)):
        yield from _aligned(first, second, _key_with_member)
        return
    (is_picked, key), *others = steps
    mine, other = ([entry for entry in entries if is_picked(entry)] for entries in (first, second))
    i = k = 0
    for one, two in _aligned(mine, other, key):
        if one and two:
            j, m = _place(first, one[0], i), _place(second, two[0], k)
            yield from _aligned_in_steps(first[i:j], second[k:m], others)
            yield one, two
            i, k = j + 1, m + 1
    yield from _aligned_in_steps(first[i:], second[k:], others)


def _place(entries: list[Any], entry: Any, start: int) -> int:
    """The place of an entry; two calls of a module are equal, but not the same."""
    return next(place for place in range(start, len(entries)) if entries[place] is entry)


def _aligned(
    first: list[Any], second: list[Any], key: Callable[[Any], Any]
) -> Iterator[tuple[list[Any], list[Any]]]:
    mine, other = [key(entry) for entry in first], [key(entry) for entry in second]
    if mine == other:
        yield from (([x], [y]) for x, y in zip(first, second, strict=True))
        return
    for tag, i, j, k, m in SequenceMatcher(None, mine, other, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from (([x], [y]) for x, y in zip(first[i:j], second[k:m], strict=True))
        elif tag == "replace":
            yield first[i:j], []
            yield [], second[k:m]
        else:
            yield first[i:j], second[k:m]


class _GraphPair:
    def __init__(self, first: Trace, second: Trace) -> None:
        self.first, self.second = first, second
        self.found = Differences()
        self.scope_of = _scopes_by_node(first.scope) | _scopes_by_node(second.scope)
        self.needed = _needed(first.graph)

    def scopes(self, a: Scope, b: Scope) -> None:
        for mine, other in _align_entries(a, b):
            if len(mine) != len(other):
                self.found.modules.add(a.path)
            elif isinstance(mine[0], Scope):
                self.scopes(mine[0], other[0])
            else:
                self.found.pairs[other[0]] = mine[0]
                self.nodes(a, mine[0], other[0])

    def nodes(self, scope: Scope, a: fx.Node, b: fx.Node) -> None:
        constants: list[ConstantTensor] = []
        blame = self.values((a, scope.path), (), (a.args, a.kwargs), (b.args, b.kwargs), constants)
        if blame is not None:
            self.found.modules.add(blame)
        elif a in self.needed:
            self.found.constants += constants

    def values(
        self, at: tuple[fx.Node, str], key: tuple[Any, ...], a: Any, b: Any, constants: list[ConstantTensor]
    ) -> str | None:
        """The module to blame if the arguments are not built alike; differing constants are noted."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return None if self.same_node(a, b) else self.meeting(at[0], a, b)
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            pairs: list[tuple[Any, Any, Any]] = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            pairs = [(name, a[name], b[name]) for name in a]
        elif isinstance(a, slice) and isinstance(b, slice):
            pairs = [(part, getattr(a, part), getattr(b, part)) for part in ("start", "stop", "step")]
        elif isinstance(a, _BUILT) or isinstance(b, _BUILT):
            return at[1]
        else:
            if not _equal(a, b):
                constants.append(ConstantTensor(*at, key, a, b))
            return None
        blames = [self.values(at, (*key, name), x, y, constants) for name, x, y in pairs]
        return next((blame for blame in blames if blame is not None), None)

    def same_node(self, a: fx.Node, b: fx.Node) -> bool:
        if a.op == "get_attr" and b.op == "get_attr":
            mine, other = self.first.constants.get(str(a.target)), self.second.constants.get(str(b.target))
            return equal_tensors(mine, other) if mine is not None else other is None and a.target == b.target
        known = self.found.pairs.get(b)
        # A node without a partner stands in a module that is already known to differ.
        return known is a or (known is None and bool(self.found.modules))

    def pair(self, first: fx.Node, second: fx.Node) -> bool:
        """Pair two nodes, and all that they are computed from; False if these are not the same calls."""
        pending = [(first, second)]
        while pending:
            a, b = pending.pop()
            mine, other = a.all_input_nodes, b.all_input_nodes
            if _key(a) != _key(b) and not a.op == b.op == "get_attr":
                return False
            mine, other = [*mine, *first_writes(a)], [*other, *first_writes(b)]
            if len(mine) != len(other) or self.found.pairs.setdefault(b, a) is not a:
                return False
            pending += [(x, y) for x, y in zip(mine, other, strict=True) if y not in self.found.pairs]
        return True

    def meeting(self, *nodes: fx.Node) -> str:
        """The innermost module that contains all of these nodes: there the wrong operand was chosen."""
        chains = [self.scope_of[node].chain for node in nodes if node in self.scope_of]
        common = [atoms[0] for atoms in zip(*chains, strict=False) if len({*atoms}) == 1]
        return common[-1] if common else ""


_BUILT = (fx.Node, tuple, list, dict, slice)


def _key(entry: Any) -> Any:
    if isinstance(entry, Scope):
        return "enter", entry.path
    return entry.op, entry.target, tuple(entry.kwargs)  # two objects of a class may hold other attributes


def _key_with_member(entry: Any) -> Any:
    picks = not isinstance(entry, Scope) and entry.target is operator.getitem
    member = (entry.args[1],) if picks and isinstance(entry.args[1], (str, int)) else ()
    return (*_key(entry), *member)


def _makes_tensors(entry: Any) -> bool:
    return _is_call(entry) or any(isinstance(x, Tensor) for x in pytree.tree_leaves(entry.meta.get("val")))


def _is_call(entry: Any) -> bool:
    return isinstance(entry, Scope) or entry.op == "call_module"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, DtypeOf) and isinstance(b, DtypeOf):
        return True
    a, b = (x.dtype if isinstance(x, DtypeOf) else x for x in (a, b))
    return a is b or (type(a) is type(b) and (a == b or (a != a and b != b)))


def equal_tensors(a: Any, b: Any) -> bool:
    """Whether two constants are the same tensor, or hold the same numbers."""
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and not a.is_meta and torch.equal(a, b)


def _fills(node: fx.Node) -> bool:
    """Whether a node sets entries of a tensor that is new, which comes before all that reads it."""
    made = node.args[0] if node.target is operator.setitem else None
    return isinstance(made, fx.Node) and node in first_writes(made)


def _scopes_by_node(scope: Scope) -> dict[fx.Node, Scope]:
    found: dict[fx.Node, Scope] = {}
    pending = [scope]
    while pending:
        inner = pending.pop()
        for entry in inner.entries:
            if isinstance(entry, Scope):
                pending.append(entry)
            else:
                found[entry] = inner
    return found


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that matter: read by one that matters, or with an effect of their own."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if not is_pure(node) or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def take_regions(found: Differences) -> None:
    """Note which nodes are checkpointed in training; ``found`` compares a trace in training with another."""
    for other, mine in found.pairs.items():
        if "checkpoint" in other.meta and "checkpoint" not in mine.meta:
            mine.meta["checkpoint"] = replace(other.meta["checkpoint"], training=True)
