"""Functions of tensors as data: they run, print, compare, pickle."""

import copy
import operator
import pickle

import pytest
import torch
from torch.nn import functional as F

from fxprune.graph.tensor_function import PREVIOUS, Call, Operand, TensorFunction, same

FUNCTIONS = {
    "x0": TensorFunction(),
    "view(x0, [2, 8, 16])": TensorFunction.of("view", PREVIOUS, [2, 8, 16]),
    "cat([x0, x1], 1)": TensorFunction.of(torch.cat, [Operand(0), Operand(1)], 1),
    "cat([x0, zeros_like(x1)])": TensorFunction.of(torch.cat, [Operand(0), Operand(1, is_zero=True)]),
    "chunk(x0, 3, dim=1)[2]": TensorFunction.of("chunk", PREVIOUS, 3, dim=1).then(
        operator.getitem, PREVIOUS, 2
    ),
    "x0[..., 1:, ::2, None]": TensorFunction.of(
        operator.getitem, PREVIOUS, (Ellipsis, slice(1, None), slice(None, None, 2), None)
    ),
    "cat([view(x0, [4]), x0])": TensorFunction.of("view", PREVIOUS, [4]).then(
        torch.cat, [PREVIOUS, Operand(0)]
    ),
    "x0.T": TensorFunction.of(getattr, PREVIOUS, "T"),
    "x0[[2, 0, 1]]": TensorFunction.of(operator.getitem, PREVIOUS, torch.tensor([2, 0, 1])),
    "x0[<int64 9>]": TensorFunction.of(operator.getitem, PREVIOUS, torch.arange(9)),
    "flatten(pad(x0, [1, 1], value=0.0), 1)": TensorFunction.of(F.pad, PREVIOUS, [1, 1], value=0.0).then(
        "flatten", PREVIOUS, 1
    ),
}


@pytest.mark.parametrize("text", FUNCTIONS)
def test_prints_compares_and_copies(text: str) -> None:
    function = FUNCTIONS[text]
    assert str(function) == text
    for twin in (pickle.loads(pickle.dumps(function)), copy.deepcopy(function)):
        assert twin == function
        assert hash(twin) == hash(function)
        assert str(twin) == text
    assert sum(function == other for other in FUNCTIONS.values()) == 1


def test_runs_on_its_operands() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    joined = FUNCTIONS["cat([x0, x1], 1)"]
    assert torch.equal(joined(x, y), torch.cat([x, y], 1))
    assert torch.equal(FUNCTIONS["cat([x0, zeros_like(x1)])"](x, y), torch.cat([x, torch.zeros(2, 3)]))
    assert torch.equal(FUNCTIONS["chunk(x0, 3, dim=1)[2]"](x), x[:, 2:])
    assert TensorFunction()(x) is x
    part = joined.followed_by(FUNCTIONS["x0[..., 1:, ::2, None]"])
    assert torch.equal(part(x, y), torch.cat([x, y], 1)[..., 1:, ::2, None])
    assert joined.followed_by(None) == joined


def test_containers_of_fx_become_plain_ones() -> None:
    sizes = torch.fx.immutable_collections.immutable_list([2, 3])
    function = TensorFunction.of("view", PREVIOUS, sizes)
    assert type(function.calls[0].args[1]) is list
    size = TensorFunction.of("view", PREVIOUS, torch.Size([2, 3])).calls[0].args[1]
    assert type(size) is tuple


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), False),
        (torch.zeros(2), torch.zeros(2, 1), False),
        ([torch.zeros(2), 1], [torch.zeros(2), 1], True),
        ([1, 2], (1, 2), False),
        ({"a": slice(0, 2)}, {"a": slice(0, 2)}, True),
        ({"a": slice(0, 2)}, {"a": slice(0, 3)}, False),
        ({"a": 1}, {"b": 1}, False),
        (1, True, False),
        (torch.zeros(2), None, False),
    ],
)
def test_same_compares_content(a: object, b: object, expected: bool) -> None:
    assert same(a, b) is expected


@pytest.mark.parametrize(
    ("index", "expected"), [(1, "x[1]"), ((1, 2), "x[1, 2]"), ((1,), "x[(1,)]"), ((), "x[()]")]
)
def test_an_index_is_spelled_as_python_reads_it(index: object, expected: str) -> None:
    text = Call(operator.getitem, (PREVIOUS, index)).text("x")
    assert text == expected
    assert eval(f"lambda x: {text}") is not None
