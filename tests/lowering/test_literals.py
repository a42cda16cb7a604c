"""The numbers in a movement's arguments that depend on sizes, by place, role and axis."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import capture, lower
from fxprune.graph import ir

Row = tuple[tuple[int | str, ...], int, str, str, int]


class Move(nn.Module):
    """A linear layer to 12 features, and a movement of them; shape ``(2, 5, 12)``."""

    def __init__(self, move: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)
        self.move = move

    def forward(self, x: Tensor) -> Any:
        return self.move(self.layer(x))


def literals(move: Callable[[Tensor], Any]) -> list[list[Row]]:
    graph = lower(capture(Move(move), torch.ones(2, 5, 8)))
    assert pickle.loads(pickle.dumps(graph)) == graph
    gathers = [op for op in graph.ops if isinstance(op, ir.Gather)]
    return [[(x.place, x.value, x.role, x.side, x.axis) for x in op.literals] for op in gathers]


CASES: dict[str, tuple[Callable[[Tensor], Any], list[list[Row]]]] = {
    "view": (
        lambda x: x.view(-1, 5, 3, 4),
        [[((i,), n, "size", "output", i - 1) for i, n in ((2, 5), (3, 3), (4, 4))]],
    ),
    "reshape by a tuple": (
        lambda x: x.reshape((x.shape[0], 60)),
        [[((1, 1), 60, "size", "output", 1)]],
    ),
    "torch.reshape by name": (
        lambda x: torch.reshape(x, shape=(-1, 12)),
        [[(("shape", 1), 12, "size", "output", 1)]],
    ),
    "sizes of other nodes": (lambda x: x.view(x.shape[0], x.shape[1], -1, x.shape[2] // 3), [[]]),
    "expand": (
        lambda x: x.unsqueeze(1).expand(-1, 3, -1, 12),
        [[], [((2,), 3, "size", "output", 1), ((4,), 12, "size", "output", 3)]],
    ),
    "unflatten": (
        lambda x: x.unflatten(-1, (3, 4)),
        [[((2, 0), 3, "size", "output", 2), ((2, 1), 4, "size", "output", 3)]],
    ),
    "nn.Unflatten": (
        nn.Unflatten(2, (3, 4)),
        [
            [
                (("unflattened_size", 0), 3, "size", "output", 2),
                (("unflattened_size", 1), 4, "size", "output", 3),
            ]
        ],
    ),
    "split": (lambda x: x.split(7, dim=-1), [[((1,), 7, "size", "output", 2)]] * 2),
    "split by a list": (
        lambda x: torch.split(x, [4, 8], 2),
        [[((1, 0), 4, "size", "output", 2)], [((1, 1), 8, "size", "output", 2)]],
    ),
    "chunk": (lambda x: x.chunk(2, dim=2), [[((1,), 2, "parts", "input", 2)]] * 2),
    "narrow": (
        lambda x: x.narrow(2, 3, 4),
        [[((2,), 3, "start", "input", 2), ((3,), 4, "size", "output", 2)]],
    ),
    "select": (lambda x: x.select(-1, 3), [[((2,), 3, "index", "input", 2)]]),
    "slice": (
        lambda x: x[:, 0:4, None, 2:8],
        [
            [
                ((1, 1, "stop"), 4, "stop", "input", 1),
                ((1, 3, "start"), 2, "start", "input", 2),
                ((1, 3, "stop"), 8, "stop", "input", 2),
            ]
        ],
    ),
    "slice after an ellipsis": (
        lambda x: x[..., -3:],
        [[((1, 1, "start"), -3, "start", "input", 2)]],
    ),
    "an index alone": (lambda x: x[1], [[((1,), 1, "index", "input", 0)]]),
    "a list of indices": (
        lambda x: x[:, :, [1, 5]],
        [[((1, 2, 0), 1, "index", "input", 2), ((1, 2, 1), 5, "index", "input", 2)]],
    ),
    "flatten": (lambda x: x.flatten(1), [[]]),
}


@pytest.mark.parametrize("name", CASES)
def test_literals(name: str) -> None:
    move, expected = CASES[name]
    assert literals(move) == expected


def test_a_literal_takes_part_in_comparisons() -> None:
    long, short = (
        lower(capture(Move(move), torch.ones(2, 5, 8)))
        for move in (lambda x: x[..., 2:12], lambda x: x[..., 2:])
    )
    assert [op.literals for op in long.ops if isinstance(op, ir.Gather)] != [
        op.literals for op in short.ops if isinstance(op, ir.Gather)
    ]
    assert long != short
