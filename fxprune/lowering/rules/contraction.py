"""Contractions of two values (matrix products, einsum), and with parameters that no layer wraps."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.graph.tensor_function import Operand as Place
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.picked import one_of_many
from fxprune.lowering.rules.pointwise import plus_constant
from fxprune.lowering.rules.table import Context, RuleTable, Unknown

__all__ = ["contract", "table"]

table = RuleTable()

Operand = ir.Value | Constant


def contract(context: Context, equation: str, a: Operand, b: Operand, shape: Sequence[int]) -> ir.Value:
    """``einsum(equation, a, b)``: a kernel set if one operand is a prunable parameter, one for each part if
    it is joined of several, else a mix.
    """
    build = context.build
    left, right, out = equation.replace("->", ",").split(",")
    for place, w in enumerate((a, b)):
        if isinstance(w, Constant) and w.joined is not None and isinstance((b, a)[place], ir.Value):
            return _with_joined(context, equation, (a, b), place, shape)
    for x, w, x_letters, w_letters in ((a, b, left, right), (b, a, right, left)):
        if isinstance(w, Constant) and w.weight is not None and isinstance(x, ir.Value):
            narrow = _without_broadcasts(context, x, w, (x_letters, w_letters, out))
            if narrow is not None:
                return _with_weight(context, *narrow, shape)
    many = one_of_many(build, equation, (a, b))
    if many is not None:
        each = contract(context, many.equation, *many.factors, many.shape)
        return many.any_of(build, each, shape)
    return build.mix(equation, build.materialise(a, exact=True), build.materialise(b, exact=True), shape)


def _roles(letters: tuple[str, str, str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """The letters that both operands and the result have, that are summed over, that the weight brings, and
    that the value keeps."""
    x_letters, w_letters, out = letters
    shared = [c for c in w_letters if c in x_letters and c in out]
    gone = [c for c in w_letters if c in x_letters and c not in out]
    made = [c for c in w_letters if c not in x_letters and c in out]
    return shared, gone, made, [c for c in x_letters if c not in gone + shared]


def _without_broadcasts(
    context: Context, x: ir.Value, w: Constant, letters: tuple[str, str, str]
) -> tuple[ir.Value, ir.WeightRef, tuple[str, str, str]] | None:
    """The factors without axes of size one that the other factor's are broadcast along; None unless their
    product is a linear layer, in which a zero of the parameter is one.
    """
    x_letters, w_letters, out = letters
    for c in (c for c in w_letters if c in x_letters):
        at, own = x_letters.index(c), w_letters.index(c)
        if w.shape[own] == 1 < x.shape[at]:
            w, w_letters = w.select(own), w_letters.replace(c, "")
        elif x.shape[at] == 1 < w.shape[own]:
            x = context.build.gather(
                TensorFunction.of("select", PREVIOUS, at, 0), [x], (*x.shape[:at], *x.shape[at + 1 :])
            )
            x_letters = x_letters.replace(c, "")
    ref = w.weight
    assert ref is not None
    letters = x_letters, w_letters, out
    return (x, ref, letters) if _is_linear(x, ref, letters) else None


def _is_linear(x: ir.Value, ref: ir.WeightRef, letters: tuple[str, str, str]) -> bool:
    """Whether the product is a linear layer: nothing broadcasts, and a zero of the parameter is one here."""
    x_letters, w_letters, out = letters
    shared, gone, made, kept = _roles(letters)
    sizes = dict(zip(x_letters, x.shape, strict=True))
    known = all(sizes.get(c, size) == size for c, size in zip(w_letters, ref.shape, strict=True))
    whole = len(shared + gone + made) == len(w_letters) and sorted(kept + shared + made) == sorted(out)
    return known and whole and not ref.computed


def _with_weight(
    context: Context, x: ir.Value, ref: ir.WeightRef, letters: tuple[str, str, str], shape: Sequence[int]
) -> ir.Value:
    """A linear layer in other words: move the summed axes last, contract, move the new axes into place."""
    x_letters, w_letters, out = letters
    shared, gone, made, kept = _roles(letters)  # shared: a matrix each, blocks of one matrix
    sizes = dict(zip(x_letters, x.shape, strict=True)) | dict(zip(w_letters, ref.shape, strict=True))
    blocks = math.prod(sizes[c] for c in shared)
    rows, columns = math.prod(sizes[c] for c in made), math.prod(sizes[c] for c in gone)
    view = ref.view or TensorFunction()
    view = view.then("permute", PREVIOUS, [w_letters.index(c) for c in shared + made + gone])
    view = view.then("reshape", PREVIOUS, (blocks, rows, columns))
    view = view.then(getitem, PREVIOUS, 0) if blocks == 1 else view.then(block_diagonal, PREVIOUS)
    if shared + gone:
        order = [x_letters.index(c) for c in kept + shared + gone]
        arrange = TensorFunction.of("permute", PREVIOUS, order).then("flatten", PREVIOUS, len(kept))
    else:  # an outer product sums over nothing: an axis of size one stands in
        arrange = TensorFunction.of("unsqueeze", PREVIOUS, -1)
    place = TensorFunction.of("reshape", PREVIOUS, [sizes[c] for c in kept + shared + made])
    place = place.then("permute", PREVIOUS, [(kept + shared + made).index(c) for c in out])

    build = context.build
    last = build.gather(arrange, [x], [*(sizes[c] for c in kept), blocks * columns])
    whole = replace(ref, shape=(blocks * rows, blocks * columns), view=view)
    made_last = build.linear(last, whole, bias=None, weights=blocks * rows * columns)
    return build.gather(place, [made_last], shape)


def _with_joined(
    context: Context, equation: str, factors: tuple[Operand, Operand], place: int, shape: Sequence[int]
) -> ir.Value:
    """A product with each part of the factor at ``place``; the results are joined, or added up."""
    build = context.build
    terms = equation.replace("->", ",").split(",")
    whole, other, out = factors[place], factors[1 - place], terms[2]
    assert isinstance(whole, Constant)
    assert whole.joined is not None
    assert isinstance(other, ir.Value)
    letter = terms[place][whole.joined.axis]
    axis = terms[1 - place].find(letter)  # of the other factor
    results, start = [], 0
    for part in whole.joined.parts:
        size = part.shape[whole.joined.axis]
        x, own = other, [size if c == letter else n for c, n in zip(out, shape, strict=True)]
        if axis >= 0 and other.shape[axis] > 1:
            cut = TensorFunction.of("narrow", PREVIOUS, axis, start, size)
            x = build.gather(cut, [other], [*other.shape[:axis], size, *other.shape[axis + 1 :]])
        letters = equation
        if axis < 0 and letter not in out and size == 1:  # added up
            part, letters = part.select(whole.joined.axis), equation.replace(letter, "")
        pair: tuple[Operand, Operand] = (x, part) if place else (part, x)
        results.append(contract(context, letters, *pair, own))
        start += size
    if letter not in out:
        return build.sum(results, shape)
    join = TensorFunction.of(torch.cat, [Place(i) for i in range(len(results))], out.index(letter))
    return build.gather(join, results, shape)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Put the matrices of a batch on the diagonal of one matrix."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


# -- matrix products -----------------------------------------------------------------------------
_MATMUL = (
    torch.matmul,
    "matmul",
    operator.matmul,
    torch.bmm,
    "bmm",
    torch.mm,
    "mm",
    torch.mv,
    "mv",
    torch.dot,
    "dot",
)


@table.rule(*_MATMUL, "__matmul__", operator.imatmul)
def matmul(context: Context, a: Operand, b: Operand) -> ir.Value:
    """Batched matrix product."""
    return product(context, a, b, context.shape)


def product(context: Context, a: Operand, b: Operand, shape: Sequence[int]) -> ir.Value:
    """``a @ b``, whose result has this shape."""
    rows, columns = len(a.shape), len(b.shape)
    batch = "abcdefgh"[: max(rows, columns, 2) - 2]
    left = "i" if rows == 1 else batch[len(batch) - rows + 2 :] + "yi"
    right = "i" if columns == 1 else batch[len(batch) - columns + 2 :] + "iz"
    out = batch + ("y" if rows > 1 else "") + ("z" if columns > 1 else "")
    return contract(context, f"{left},{right}->{out}", a, b, shape)


@table.rule("__rmatmul__")
def reversed_matmul(context: Context, a: Operand, b: Operand) -> ir.Value:
    return product(context, b, a, context.shape)


@table.rule(torch.baddbmm, "baddbmm", torch.addmm, "addmm", torch.addmv, "addmv", torch.addbmm)
def add_matmul(
    context: Context, x: Any, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1
) -> ir.Value:
    """``y = beta x + alpha a @ b``."""
    if context.target is torch.addbmm:
        raise Unknown("a matrix product summed over the batch")
    build, shape = context.build, context.shape
    result = product(context, a, b, shape)
    if not beta:
        return result
    return build.sum([x, result], shape) if isinstance(x, ir.Value) else plus_constant(context, result, x)


_GROUPED = {
    getattr(room, name): None
    for room, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
    if hasattr(room, name)
}


@table.rule(*_GROUPED)
def grouped(context: Context, a: Operand, b: Operand, offs: Any = None, bias: Any = None, **_: Any) -> Any:
    """Rows of ``a`` in groups, each multiplied with its own matrix: with any, for the ends are unknown."""
    if len(a.shape) != 2 or len(b.shape) != 3 or bias is not None:
        raise Unknown("a grouped product of other than rows with a matrix for each group")
    shape = context.shape
    each = contract(context, "nk,ekm->nem", a, b, (shape[0], b.shape[0], shape[1]))
    return context.build.reduce(each, "max", (1,), False, shape)


@table.rule(torch.outer, "outer", torch.ger)
def outer(context: Context, a: Operand, b: Operand) -> ir.Value:
    return contract(context, "y,z->yz", a, b, context.shape)


@table.rule(torch.kron, "kron")
def kron(context: Context, a: Operand, b: Operand) -> ir.Value:
    """Every entry of ``a`` times all of ``b``: blocks side by side."""
    build, rank = context.build, max(len(a.shape), len(b.shape))
    sizes = [(1,) * (rank - len(x.shape)) + tuple(x.shape) for x in (a, b)]
    shapes = [
        [size for n in own for size in ((n, 1) if first else (1, n))]
        for own, first in zip(sizes, (True, False), strict=True)
    ]
    sides = [
        build.gather(TensorFunction.of("reshape", PREVIOUS, shape), [build.materialise(x)], shape)
        for x, shape in zip((a, b), shapes, strict=True)
    ]
    full = [n * m for n, m in zip(*shapes, strict=True)]
    product = build.gate(sides[0], sides[1], full)
    return build.gather(TensorFunction.of("reshape", PREVIOUS, context.shape), [product], context.shape)


@table.rule(torch.linalg.multi_dot, torch.chain_matmul)
def chain(context: Context, *matrices: Any) -> ir.Value:
    """``a @ b @ c``, from the left, or from the first matrix that depends on the input."""
    parts = list(matrices[0]) if isinstance(matrices[0], (list, tuple)) else list(matrices)
    first = next(i for i, x in enumerate(parts) if isinstance(x, ir.Value))
    made: ir.Value = parts[first]
    for other in parts[first + 1 :]:
        shape = (*made.shape[:-1], *other.shape[1:])
        made = product(context, made, other, shape)
    for other in reversed(parts[:first]):
        shape = (*other.shape[:-1], *made.shape[1:])
        made = product(context, other, made, shape)
    return made


# -- einsum --------------------------------------------------------------------------------------
@table.rule(torch.einsum)
def einsum(context: Context, equation: Any, *operands: Any) -> ir.Value:
    """Any number of factors, two at a time; one operand alone is summed and moved."""
    factors = (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    )
    if not isinstance(equation, str):
        raise Unknown("einsum with sublists")
    terms, out = _explicit(equation.replace(" ", ""), factors)
    made: ir.Value | None = None
    while len(factors) > 1:
        rest = "".join(terms[2:]) + out
        last = len(factors) == 2
        joined = "".join(dict.fromkeys(terms[0] + terms[1]))
        kept = out if last else "".join(c for c in joined if c in rest)
        sizes: dict[str, int] = {}
        for term, factor in zip(terms[:2], factors[:2], strict=True):
            for c, size in zip(term, factor.shape, strict=True):
                sizes[c] = max(size, sizes.get(c, 1))
        shape = [sizes[c] for c in kept]
        made = contract(context, f"{terms[0]},{terms[1]}->{kept}", factors[0], factors[1], shape)
        factors, terms = [made, *factors[2:]], [kept, *terms[2:]]
    return made if made is not None else _alone(context, factors[0], terms[0], out)


def _explicit(equation: str, factors: Sequence[Operand]) -> tuple[list[str], str]:
    """Letters of every operand and of the result, with ``...`` and the arrow spelled out."""
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [len(f.shape) - len(t) + 3 if "..." in t else 0 for t, f in zip(terms, factors, strict=True)]
    dots = "".join(spare[: max(widths)])
    terms = [t.replace("...", dots[len(dots) - w :]) for t, w in zip(terms, widths, strict=True)]
    if any(len(set(term)) != len(term) for term in terms):
        raise Unknown(f"einsum over a diagonal: {equation}")
    if not arrow:
        letters = "".join(terms)
        out = "..." + "".join(sorted(c for c in set(letters) - set(dots) if letters.count(c) == 1))
    return terms, out.replace("...", dots)


def _alone(context: Context, x: Operand, letters: str, out: str) -> ir.Value:
    build = context.build
    value = build.materialise(x)
    gone = [i for i, c in enumerate(letters) if c not in out]
    kept = [c for c in letters if c in out]
    if gone:
        value = build.reduce(value, "sum", gone, False, [value.shape[letters.index(c)] for c in kept])
    order = [kept.index(c) for c in out]
    return build.gather(TensorFunction.of("permute", PREVIOUS, order), [value], context.shape)


@table.rule(torch.tensordot)
def tensordot(context: Context, a: Operand, b: Operand, dims: Any = 2, **_: Any) -> ir.Value:
    """The last axes of ``a`` against the first of ``b``, or those named."""
    rank_a, rank_b = len(a.shape), len(b.shape)
    pairs = (range(rank_a - dims, rank_a), range(dims)) if isinstance(dims, int) else dims
    left, right = list("abcdefgh"[:rank_a]), list("ABCDEFGH"[:rank_b])
    for i, j in zip(*pairs, strict=True):
        right[j % rank_b] = left[i % rank_a]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return contract(context, f"{''.join(left)},{''.join(right)}->{''.join(out)}", a, b, context.shape)
