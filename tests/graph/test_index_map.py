"""Index maps say which input entry every output entry of a movement copies."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from operator import getitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, lowered_net
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import capture, lower
from fxprune.graph import ir
from fxprune.graph.index_map import CONSTANT, IndexMap, find_index_map
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction

of = TensorFunction.of


def index_map(move: TensorFunction, *shapes: Sequence[int]) -> IndexMap:
    tensors = [torch.zeros(*shape) for shape in shapes]
    return find_index_map(move, [tuple(shape) for shape in shapes], tuple(move(*tensors).shape))


BOTH = [Operand(0), Operand(1)]
CASES: list[tuple[TensorFunction, list[tuple[int, ...]], str]] = [
    (of("permute", PREVIOUS, 0, 2, 1), [(2, 3, 4)], "x0[o0, o2, o1]"),
    (of("flatten", PREVIOUS, 1), [(2, 3, 4)], "x0[o0, o1 // 4, o1 % 4]"),
    (of("flatten", PREVIOUS, 1), [(2, 3, 2, 2)], "x0[o0, o1 // 4, o1 // 2 % 2, o1 % 2]"),
    (of("view", PREVIOUS, 2, 2, 6), [(2, 12)], "x0[o0, 6 * o1 + o2]"),
    (of("expand", PREVIOUS, 2, 5), [(2, 1)], "x0[o0, 0]"),
    (of("repeat", PREVIOUS, 1, 2), [(2, 3)], "x0[o0, o1 % 3]"),
    (of("repeat_interleave", PREVIOUS, 2, 1), [(2, 3)], "x0[o0, o1 // 2]"),
    (of("flip", PREVIOUS, 1), [(2, 3)], "x0[o0, -o1 + 2]"),
    (of("roll", PREVIOUS, 1, 1), [(2, 3)], "x0[o0, [2, 0, 1]]"),
    (of("chunk", PREVIOUS, 2, 1).then(getitem, PREVIOUS, 1), [(2, 6)], "x0[o0, o1 + 3]"),
    (of(getitem, PREVIOUS, (slice(None), slice(1, None, 2))), [(2, 6)], "x0[o0, 2 * o1 + 1]"),
    (of(getitem, PREVIOUS, (slice(None), 3)), [(2, 6)], "x0[o0, 3]"),
    (of(torch.cat, BOTH, 1), [(2, 3), (2, 1)], "x0[o0, o1] for o1 in 0:3; x1[o0, 0] for o1 in [3]"),
    (of(torch.stack, BOTH, 0), [(4,), (4,)], "x0[o1] for o0 in [0]; x1[o1] for o0 in [1]"),
    (of(F.pad, PREVIOUS, [1, 2]), [(2, 3)], "x0[o0, o1 - 1] for o1 in 1:4; 0 elsewhere"),
    (of(F.pad, PREVIOUS, [1, 0], value=1.0), [(2, 3)], "x0[o0, o1 - 1] for o1 in 1:4; constant elsewhere"),
    (
        of(F.pixel_shuffle, PREVIOUS, 2),
        [(1, 8, 2, 2)],
        "x0[0, 4 * o1 + 2 * (o2 % 2) + o3 % 2, o2 // 2, o3 // 2]",
    ),
    (of("view", PREVIOUS, 3, 2), [(2, 3)], "flat map of 6 entries"),
    (of("tril", PREVIOUS), [(3, 3)], "flat map of 9 entries"),
]


@pytest.mark.parametrize(("move", "shapes", "text"), CASES, ids=[str(case[0]) for case in CASES])
def test_compact_form(move: TensorFunction, shapes: list[tuple[int, ...]], text: str) -> None:
    found = index_map(move, *shapes)
    assert str(found) == text
    tensors = [torch.randn(shape) for shape in shapes]
    expected = move(*tensors)
    assert torch.equal(found.apply(*tensors), expected)
    filled = found.apply(*tensors, constant=7.0)
    assert torch.equal(filled == 7.0, found.flat_index() == CONSTANT)
    for twin in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert twin == found
    assert found != index_map(of("unsqueeze", PREVIOUS, 0), (2,))


def test_along_names_the_axis_and_the_entries() -> None:
    joined = index_map(of(torch.cat, BOTH, 1), (2, 3), (2, 2))
    for i, expected in enumerate(([0, 1, 2, -1, -1], [-1, -1, -1, 0, 1])):
        found = joined.along(i, 1)
        assert found is not None
        assert found[0] == 1
        assert found[1].tolist() == expected
    assert index_map(of("view", PREVIOUS, 2, 2, 6), (2, 12)).along(0, 1) is None


# -- random chains -----------------------------------------------------------------------------------
def _merge(x: Tensor, a: int, b: int) -> TensorFunction:
    return of("flatten", PREVIOUS, min(a, b), max(a, b))


def _divide(x: Tensor, a: int, b: int) -> TensorFunction:
    size = x.shape[a]
    divisor = next(d for d in range(2 if size > 1 else 1, size + 1) if size % d == 0)
    return of("unflatten", PREVIOUS, a, (divisor, size // divisor))


STEPS: list[Callable[[Tensor, int, int], TensorFunction]] = [
    _merge,
    _divide,
    lambda x, a, b: of("transpose", PREVIOUS, a, b),
    lambda x, a, b: of("unsqueeze", PREVIOUS, a),
    lambda x, a, b: of("roll", PREVIOUS, 1 + b, a),
    lambda x, a, b: of("flip", PREVIOUS, a),
    lambda x, a, b: of("narrow", PREVIOUS, a, x.shape[a] // 2, x.shape[a] - x.shape[a] // 2),
    lambda x, a, b: of("chunk", PREVIOUS, 2, a).then(getitem, PREVIOUS, 0),
    lambda x, a, b: of(torch.cat, [PREVIOUS, PREVIOUS], a),
    lambda x, a, b: of(F.pad, PREVIOUS, [1, 2]),
    lambda x, a, b: of("reshape", PREVIOUS, (-1, x.shape[a])),
    lambda x, a, b: of("repeat_interleave", PREVIOUS, 2, a),
    lambda x, a, b: of(torch.tril, PREVIOUS) if x.dim() > 1 else TensorFunction(),
    lambda x, a, b: of(getitem, PREVIOUS, torch.arange(x.shape[0]).flip(0)[: 1 + b]),
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=5),
)
def test_random_chains(
    shape: list[int], steps: list[tuple[Callable[[Tensor, int, int], TensorFunction], int, int]]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    move, y = TensorFunction(), x
    for step, a, b in steps:
        if y.numel() > 500 or y.dim() > 6:
            break
        move = move.followed_by(step(y, a % y.dim(), b % y.dim()))
        y = move(x)
    found = find_index_map(move, [tuple(shape)], tuple(y.shape))
    assert torch.equal(found.apply(x), y)
    assert torch.equal(found.flat_index() >= 0, move(torch.ones(shape)) > 0)
    for axis in range(len(shape)):
        run = found.along(0, axis)
        if run is not None:
            size = y.shape[run[0]]
            assert run[1].shape == (size,)
            coordinates = torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))])
            moved = move(coordinates.expand(shape) + 1.0).long() - 1
            spread = run[1].view([-1 if d == run[0] else 1 for d in range(y.dim())]).expand(y.shape)
            assert torch.equal(moved[moved >= 0], spread[moved >= 0])


# -- lowered networks --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NETS)
def test_of_lowered_networks(name: str) -> None:
    graph = lowered_net(name)
    for op in graph.ops:
        if isinstance(op, ir.Gather):
            tensors = [1 + torch.rand(value.shape, dtype=torch.float64) for value in op.inputs]
            found = op.index_map()
            assert op.index_map() is found
            constant = found.flat_index() == CONSTANT
            assert torch.equal(found.apply(*tensors)[~constant], op.move(*tensors)[~constant])
            assert copy.deepcopy(op) == op
            assert "_index_map" not in vars(pickle.loads(pickle.dumps(op)))
            assert len(str(found)) < 50 * (2 + math.prod(map(len, (op.inputs, op.output.shape))))


def test_a_number_written_into_a_tensor_copies_no_entry() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[:, 0] = 5.0
            return torch.constant_pad_nd(F.pad(y, (1, 0), value=3.0), (0, 1), 4.0)

    graph = lower(capture(Written(), torch.ones(2, 4)))
    maps = [op.index_map() for op in graph.ops if isinstance(op, ir.Gather)]
    assert [str(found) for found in maps] == [
        "x0[o0, o1] for o1 in 1:4; constant elsewhere",
        "x0[o0, o1 - 1] for o1 in 1:5; constant elsewhere",
        "x0[o0, o1] for o1 in 0:5; constant elsewhere",
    ]


def test_zeros_and_constants_side_by_side_are_told_apart() -> None:
    move = of(F.pad, PREVIOUS, [1, 0]).then(F.pad, PREVIOUS, [0, 1], value=1.0)
    found = index_map(move, (2, 3))
    x = torch.randn(2, 3)
    assert torch.equal(found.apply(x), move(x))
