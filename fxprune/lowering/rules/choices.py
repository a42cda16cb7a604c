"""Choices: which entries go on depends on numbers. A choice carries no path, and any entry may be chosen."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.picked import note_picked
from fxprune.lowering.rules.table import Context, RuleTable, Unknown
from fxprune.torch_private import unique2

__all__ = ["any_along", "any_of", "any_row", "numbers", "shut_out", "table"]

SHUT = 1e4
"""Numbers that are so large leave nothing of what they are added to, behind a softmax."""

table = RuleTable()


@table.rule("masked_fill", "masked_fill_", torch.masked_fill)
def masked_fill(context: Context, x: Any, mask: Any, value: Any) -> ir.Value:
    """Minus infinity blocks attention pairs; any other number is a constant. A mask that depends on the input
    may fill any entry, or none: a choice carries no path.
    """
    build, shape = context.build, context.shape
    filled = mask.numbers() if isinstance(mask, Constant) else None
    if filled is None:
        kept = build.map_anew(build.affine(build.materialise(x), shape))
        if isinstance(value, ir.Value):
            return build.sum([kept, value], shape)
        return kept if value in (0, -math.inf) else build.affine(kept, shape, bias=True)
    result, pattern = build.materialise(x), filled.bool()
    if isinstance(value, (int, float)) and value == -math.inf:
        result = build.map_anew(result)
        build.blocked[result.index] = pattern.expand(shape)
        return result
    result = build.select(result, ~pattern, shape)
    if isinstance(value, (int, float)) and value == 0:
        return result
    return build.sum([result, build.source(pattern.shape, live=False, pattern=pattern)], shape)


def numbers(context: Context, result: Tensor) -> ir.Value:
    """Numbers that say which or how many: on no path."""
    return context.build.source(result.shape, live=False)


def any_along(context: Context, x: Any, dims: Sequence[int], shape: Sequence[int]) -> ir.Value:
    """A tensor of this shape whose entries may be any of ``x`` along some axes."""
    build = context.build
    value = build.materialise(x)
    own = [1 if d in {dim % len(value.shape) for dim in dims} else size for d, size in enumerate(value.shape)]
    return build.affine(build.reduce(value, "max", dims, True, own), shape)


def any_row(context: Context, x: Any, dim: int, shape: Sequence[int]) -> ir.Value:
    """``x.index_select(dim, index)``, where the index depends on the input."""
    found = any_along(context, x, (dim,), shape)
    return note_picked(context.build, found, x, dim % len(shape), 1)


@table.rule(torch.argmax, "argmax", torch.argmin, "argmin", torch.argsort, "argsort", torch.histc, "histc")
@table.rule(torch.bincount, "bincount", torch.nonzero, "nonzero", torch.searchsorted, torch.bucketize)
@table.rule(torch.argwhere, "argwhere")
@table.rule(F.one_hot, torch.multinomial, "multinomial", torch.count_nonzero, "count_nonzero")
def selection(context: Context, *args: Any, **kwargs: Any) -> ir.Value:
    """Select entries, or count them: the numbers say which, and carry no path of their own."""
    return numbers(context, context.result)


@table.rule(torch.topk, "topk", torch.sort, "sort", torch.kthvalue, "kthvalue", torch.mode, "mode")
@table.rule(torch.cummax, "cummax", torch.cummin, "cummin", torch.msort, "msort")
def ranked(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Each value may be any along the axis; the places carry no path."""
    result = context.result
    top = result if isinstance(result, Tensor) else result[0]
    value = context.build.materialise(x)
    if context.target in (torch.sort, "sort", torch.mode, "mode"):
        dim = kwargs.get("dim", next((a for a in args if type(a) is int), -1))
    elif context.target in (torch.cummax, "cummax", torch.cummin, "cummin"):
        dim = kwargs.get("dim", args[0] if args else -1)
    elif context.target in (torch.msort, "msort"):
        dim = 0
    else:  # the first number is k
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if len(top.shape) < len(value.shape):
        values = context.build.reduce(value, "max", (dim,), False, top.shape)
    else:
        values = any_along(context, value, (dim,), top.shape)
    return values if isinstance(result, Tensor) else (values, numbers(context, result[1]))


def any_of(context: Context, x: Any, index: Any) -> ir.Value:
    """``x[index]``, where some index tensors depend on the input: there it may be any entry of the axis."""
    build, value = context.build, context.build.materialise(x)
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    known = [part for part in parts if part is not None and part is not Ellipsis]
    ranks = [_rank(part) for part in known]
    if any(isinstance(part, ir.Value) and _is_bool(context, part) for part in parts):
        return _where_mask_holds(context, value, parts)
    dim, loose, plain = 0, [], []
    for part in parts:
        if part is Ellipsis:
            dim += len(value.shape) - sum(ranks)
        elif isinstance(part, ir.Value):
            loose.append(dim)
            part = torch.zeros(part.shape, dtype=torch.int64)
        elif isinstance(part, Constant):
            part = part.numbers()
        plain.append(part)
        dim += _rank(part) if part is not None and part is not Ellipsis else 0
    own = [1 if d in loose else size for d, size in enumerate(value.shape)]
    value = build.reduce(value, "max", loose, True, own)
    pick = TensorFunction.of(operator.getitem, PREVIOUS, tuple(plain))
    found = build.gather(pick, [value], context.shape)
    others = [part for part in parts if not isinstance(part, ir.Value) and part is not Ellipsis]
    if len(loose) == 1 and all(part == slice(None) for part in others):
        return note_picked(build, found, x, loose[0], len(found.shape) - len(value.shape) + 1)
    return found


def _where_mask_holds(context: Context, value: ir.Value, parts: Sequence[Any]) -> ir.Value:
    """``x[:, mask]``: how many entries are picked is not known, and each may be any that the mask covers."""
    build, shape = context.build, context.shape
    (mask,) = (part for part in parts if isinstance(part, ir.Value))
    others = [part for part in parts if part is not mask]
    if any(part != slice(None) and part is not Ellipsis for part in others) or Ellipsis in parts[:-1]:
        raise Unknown("entries picked by a mask that depends on the input, and by other indices")
    first = parts.index(mask)
    covered = range(first, first + len(mask.shape))
    rest = [size for d, size in enumerate(value.shape) if d not in covered]
    value = build.reduce(value, "max", covered, False, rest)
    one = [*rest[:first], 1, *rest[first:]]
    return build.affine(build.gather(TensorFunction.of("unsqueeze", PREVIOUS, first), [value], one), shape)


@table.rule(torch.masked_select, "masked_select", torch.unique, "unique", unique2)
@table.rule(torch.unique_consecutive, "unique_consecutive")
def some(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Entries of the whole tensor in a row; what counts them or says where they stood carries no path."""
    result, build = context.result, context.build
    top = result if isinstance(result, Tensor) else result[0]
    value = build.materialise(x)
    if kwargs.get("dim") is not None or len(top.shape) != 1:
        raise Unknown("different rows along an axis")
    found = build.affine(build.reduce(value, "max", range(len(value.shape)), True, [1] * len(value.shape)))
    found = build.gather(TensorFunction.of("reshape", PREVIOUS, (1,)), [found], (1,))
    found = build.affine(found, top.shape)
    if isinstance(result, Tensor):
        return found
    return (found, *(numbers(context, other) for other in result[1:]))


def _rank(part: Any) -> int:
    """Count the axes that an element of an index takes."""
    if isinstance(part, (Tensor, Constant)) and part.dtype == torch.bool:
        return len(part.shape)
    return 1


def _is_bool(context: Context, part: ir.Value) -> bool:
    """Whether an index that is a value is a mask, by the type of what its node gave."""
    found: list[Any] = [node.meta.get("val") for node in context.node.all_input_nodes]
    tensors = [val for val in found if isinstance(val, Tensor) and tuple(val.shape) == part.shape]
    return any(val.dtype == torch.bool for val in tensors)


@table.rule(torch.scatter, "scatter", "scatter_", torch.scatter_add, "scatter_add", "scatter_add_")
@table.rule(torch.scatter_reduce, "scatter_reduce", "scatter_reduce_", torch.index_add, "index_add")
@table.rule("index_add_", torch.index_copy, "index_copy", "index_copy_", torch.index_fill, "index_fill")
@table.rule(torch.index_reduce, "index_reduce", "index_reduce_", "index_fill_")
def scattered(
    context: Context, x: Any, dim: int, index: Any, source: Any = None, *args: Any, **kwargs: Any
) -> ir.Value:
    """Add any entry of the source along the axis to what was there: which one goes where is not followed."""
    build, shape = context.build, context.shape
    source = next((kwargs[name] for name in ("src", "source", "value") if name in kwargs), source)
    value = build.materialise(x)
    if not isinstance(source, (ir.Value, Constant)):
        return build.affine(value, shape, bias=source != 0)
    added = build.materialise(source)
    if not added.shape:
        return build.sum([value, added], shape)
    own = [1 if d == dim % len(shape) else size for d, size in enumerate(added.shape)]
    added = build.reduce(added, "sum", (dim % len(shape),), True, own)
    if any(a not in (1, size) for a, size in zip(own, shape, strict=True)):
        pads = [n for d in reversed(range(len(shape))) for n in (0, 0 if own[d] == 1 else shape[d] - own[d])]
        own = [1 if size == 1 else shape[d] for d, size in enumerate(own)]
        added = build.gather(TensorFunction.of(F.pad, PREVIOUS, pads), [added], own)
    return build.sum([value, build.affine(added, shape)], shape)


@table.rule(torch.masked_scatter, "masked_scatter", "masked_scatter_")
def filled_in(context: Context, x: Any, mask: Any, source: Any) -> ir.Value:
    """Each entry is that which was there, or any of the source."""
    build, value, added = context.build, context.build.materialise(x), context.build.materialise(source)
    added = build.reduce(added, "max", range(len(added.shape)), False, ())
    return build.sum([value, build.affine(added, value.shape)], value.shape)


def written_anywhere(context: Context, x: Any, index: Any, new: Any) -> ir.Value:
    """``x[index] = new`` at places that depend on the input: what was there, or any row of what is new."""
    build, value = context.build, context.build.materialise(x)
    if not isinstance(new, (ir.Value, Constant)):
        return build.affine(value, value.shape, bias=new != 0)
    added, rows = build.materialise(new), index if isinstance(index, tuple) else (index,)
    left = len(value.shape) - len(rows)  # axes that the index leaves whole
    plain = all(isinstance(part, (ir.Value, Constant)) for part in rows) and left >= 0
    kept = tuple(value.shape[len(rows) :]) if plain else ()
    if not plain or tuple(added.shape[len(added.shape) - left :]) != kept:
        kept = ()
    gone = range(len(added.shape) - len(kept))
    if gone:
        added = build.reduce(added, "max", tuple(gone), False, kept)
    return build.sum([value, build.affine(added, value.shape)], value.shape)


def shut_out(*sides: Any) -> bool:
    """Whether a choice between constants is a mask of attention: one shuts out what it is added to.

    >>> shut_out(0.0, -math.inf), shut_out(1, -1)
    (True, False)
    """
    own = [side for side in sides if not isinstance(side, ir.Value)]
    known = [side.numbers() if isinstance(side, Constant) else torch.as_tensor(side) for side in own]
    floats = [number for number in known if number is not None and number.is_floating_point()]
    return any(bool((number.abs() >= SHUT).any()) for number in floats)
