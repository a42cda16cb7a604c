"""Terms of very different powers: zeros must not set the scale of a sum."""

from __future__ import annotations

import math

import pytest
import torch
from lowering.agreement import lowered
from torch import Tensor, nn

from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow
from fxprune.paths.scaled import EMPTY, Scaled, add, at_power, moderated, multiply, normalise, square

DEPTH, WIDTH = 40, 16


class DeepBranch(nn.Module):
    """A branch of many layers beside an identity skip: 16^40 x 256 paths through it, 256 beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(x))


def weights_without(layer: int) -> dict[str, Tensor]:
    weights = {f"branch.{i}.weight": torch.ones(WIDTH, WIDTH) for i in range(DEPTH)}
    weights[f"branch.{layer}.weight"] = torch.zeros(WIDTH, WIDTH)
    return weights | {"head.weight": torch.ones(WIDTH, WIDTH)}


@pytest.mark.parametrize("dead", [0, DEPTH // 2, DEPTH - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products", ["each", "mean"])
def test_a_dead_deep_branch_does_not_set_the_scale(dead: int, dtype: torch.dtype, products: str) -> None:
    graph = lowered(DeepBranch(), torch.ones(1, WIDTH))
    found = flow(graph, weights_without(dead), dtype=dtype, products=products)  # type: ignore[arg-type]
    assert found.log_total == pytest.approx(math.log(256))
    assert found.gradients["head.weight"].double().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dead", [0, DEPTH // 2, DEPTH - 1])
def test_nor_in_a_circuit(dead: int) -> None:
    compiled = circuit(lowered(DeepBranch(), torch.ones(1, WIDTH)))
    assert compiled is not None
    counts = {name: weight.to(compiled.dtype) for name, weight in weights_without(dead).items()}
    assert compiled.run({name: compiled.dense(name) for name in counts}).log_total > 100
    assert compiled.run(counts).log_total == pytest.approx(math.log(256))


def test_a_live_deep_branch_sets_the_scale() -> None:
    graph = lowered(DeepBranch(), torch.ones(1, WIDTH))
    found = flow(graph, {}).log_total
    assert found == pytest.approx(math.log(256) + DEPTH * math.log(16))


# ---------------------------------------------------------------- powers that are integers
def real(number: Scaled[int]) -> list[float]:
    return (number.values.double() * 2.0**number.power).flatten().tolist()


def test_sums_of_numbers_at_different_powers() -> None:
    a = Scaled(torch.tensor([1.0, 2.0]), 3, 3)
    b = Scaled(torch.tensor([1.0, 0.0]), 1, 1)
    assert real(add([a, b], torch.Size((2,)))) == [10.0, 16.0]
    assert real(add([a], torch.Size((2, 2)))) == [8.0, 16.0, 8.0, 16.0]
    assert at_power(b, 3).tolist() == [0.25, 0.0]


def test_zeros_do_not_set_the_power_of_a_sum() -> None:
    zeros = normalise(torch.zeros(2), 500)
    assert zeros.level == EMPTY
    assert square(torch.zeros(2)).level == EMPTY
    assert square(torch.zeros(0)).level == EMPTY
    one = Scaled(torch.ones(2), -100, -100)
    assert real(add([one, zeros], torch.Size((2,)))) == [2.0**-100] * 2
    assert add([zeros, zeros], torch.Size((2,))).level == EMPTY


def test_products_keep_room_above_and_below() -> None:
    number = Scaled(torch.full((3,), 2.0**40), 7, 7)
    for _ in range(50):
        number = multiply(torch.mul, number, Scaled(torch.full((3,), 2.0**30), -2, -2))
        assert 2.0**15 <= float(number.values.max()) <= 2.0**48
    assert number.power + math.log2(float(number.values[0])) == 47 + 50 * 28
    kept = torch.full((3,), 2.0**33)
    assert normalise(kept, 5).values is kept, "no copy where the largest entry has not drifted"


@pytest.mark.parametrize("size", [1e-30, -3.0, 1e30])
def test_squares_of_any_size(size: float) -> None:
    found = square(torch.tensor([size, size / 2]))
    assert real(found) == pytest.approx([size**2, size**2 / 4])
    assert torch.isfinite(found.values).all()


def test_ordinary_weights_are_not_copied() -> None:
    for value in (1.0, 2.0**32, 2.0**-32, 0.0):
        weight = torch.full((2, 2), value)
        assert moderated(weight)[0] is weight
    mantissa, exponent = moderated(torch.full((2, 2), 2.0**40))
    assert (mantissa[0, 0].item(), exponent.item()) == (1.0, 40.0)
