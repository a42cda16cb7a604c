"""Runs of the two networks: their inputs, their differences, the node that a difference begins at."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.rewrite.compact.trial import (
    difference,
    differing_node,
    outputs_of,
    trial_inputs,
    verified,
)
from fxprune.rewrite.masking.copying import cast_numbers


class Sums(nn.Module):
    """Two sums; ``second`` is added where the input is positive."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(x, self.first)
        return torch.mul(torch.relu(y), self.second)


def captured(first: float, second: float) -> fx.GraphModule:
    return fxprune.capture(Sums(first, second), torch.ones(2, 3))


def test_the_first_node_with_other_numbers_is_named() -> None:
    x = (torch.ones(2, 3),)
    assert differing_node(captured(1, 1), captured(1, 2), x, 1e-6) == "mul"
    assert differing_node(captured(1, 1), captured(2, 1), x, 1e-6) == "add"
    assert differing_node(captured(1, 1), captured(1, 1), x, 1e-6) == "output"


def both(old: fx.GraphModule, new: fx.GraphModule, runs: Any) -> tuple[tuple[Any, Any], ...]:
    return tuple((outputs_of(old, x), outputs_of(new, x)) for x in runs)


def test_every_run_is_compared() -> None:
    """Nothing differs where the input is negative."""
    old, new = captured(0, 1), captured(0, 2)
    below, above = (-torch.ones(2, 3),), (torch.ones(2, 3),)
    assert verified(old, new, (below, below), both(old, new, (below, below)), lambda: new) == 0
    for runs in ((below, above), (above, below)):
        with pytest.raises(RuntimeError, match="of the largest, first at node 'mul'"):
            verified(old, new, runs, both(old, new, runs), lambda: new)


def test_rounding_is_told_from_error_in_float64() -> None:
    """A difference of 1e-4 in float32 that is none in float64 is rounding."""
    old, new = captured(0, 1), captured(0, 1.0001)
    x = (torch.ones(2, 3),)
    outputs = both(old, new, (x, x))
    assert verified(old, new, (x, x), outputs, lambda: captured(0, 1)) == 0
    with pytest.raises(RuntimeError, match="outputs differ"):
        verified(old, new, (x, x), outputs, lambda: new)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]), 0.25),
        ([torch.zeros(2), torch.tensor(2)], [torch.zeros(2), torch.tensor(2)], 0.0),
        (torch.tensor([1]), torch.tensor([2]), math.inf),
        (torch.zeros(2), torch.zeros(3), math.inf),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]), 0.0),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0]), math.inf),
    ],
)
def test_differences_are_relative_to_the_largest_entry(old: object, new: object, expected: float) -> None:
    assert difference(old, new) == expected


def test_inputs_are_drawn_in_the_shape_and_range_of_the_examples() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x[index]

    example = (torch.ones(4, 3), torch.tensor([0, 3, 2]))
    gm = fxprune.capture(Two(), example)
    first, again, other = (trial_inputs(gm, example, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert (first[0].shape, first[1].shape) == ((4, 3), (3,))
    assert 0 <= int(first[1].min()) <= int(first[1].max()) <= 3


class Sampled(nn.Module):
    """Draws a latent in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(6, 8), nn.Linear(6, 8)
        self.wide, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        latent = torch.distributions.Normal(self.mean(x), self.spread(x).exp()).rsample()
        return self.out(torch.relu(self.wide(latent)))


def test_networks_that_draw_are_compared_with_the_same_numbers() -> None:
    torch.manual_seed(0)
    net, x = Sampled().eval(), torch.randn(5, 6)
    pruned = fxprune.apply(
        net,
        "random",
        0.5,
        granularity="channel",
        exclude=["mean", "spread"],
        example_inputs=x,
        progress=False,
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    small = fxprune.compact(pruned)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states[1:]
    assert small.get_submodule("wide").weight.shape[0] < 16
    torch.manual_seed(1)
    expected = pruned(x)
    torch.manual_seed(1)
    assert torch.allclose(small(x), expected, atol=1e-6)
    assert not torch.allclose(small(x), expected, atol=1e-2)


def test_a_run_draws_what_its_seed_says() -> None:
    gm = fxprune.capture(Sampled().eval(), torch.ones(2, 6))
    x = (torch.ones(2, 6),)
    assert torch.equal(outputs_of(gm, x, 3), outputs_of(gm, x, 3))
    assert not torch.equal(outputs_of(gm, x, 3), outputs_of(gm, x, 4))


class Resized(nn.Module):
    """Adds a table in a size that is one of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 4, 4))

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        return x + nn.functional.interpolate(self.table, tuple(size.tolist())).flatten(2).mT


class Sized(nn.Module):
    """Layers behind such a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide, self.out = Resized(), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        return self.out(torch.relu(self.wide(self.embed(x, size))))


@pytest.mark.filterwarnings("ignore:capture", "ignore:.*cannot be pruned")
def test_whole_numbers_that_no_other_will_do_for_are_those_of_the_examples(tmp_path: Path) -> None:
    """No product of two sizes but 3 x 2 and 2 x 3 is six."""
    torch.manual_seed(0)
    net, inputs = Sized().eval(), (torch.randn(2, 6, 4), torch.tensor([2, 3]))
    pruned = fxprune.apply(
        net, "magnitude", 0.3, granularity="channel", example_inputs=inputs, progress=False
    )
    with pytest.raises(ValueError, match="example_inputs=None: the network does not run on whole numbers"):
        fxprune.compact(pruned)
    small = fxprune.compact(pruned, inputs)
    assert small.get_submodule("wide").weight.shape[0] < 8
    assert torch.allclose(small(*inputs), pruned(*inputs), atol=1e-6)
    fxprune.save(small, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="example_inputs=None: the shapes in the file are not enough"):
        fxprune.load(tmp_path / "net.safetensors", Sized().eval())
    again = fxprune.load(tmp_path / "net.safetensors", Sized().eval(), example_inputs=inputs)
    assert torch.equal(again(*inputs), small(*inputs))


class Turned(nn.Module):
    """A complex layer on the spectrum of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(3, 3, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.turn(torch.fft.fft(x)).abs()
        return y


def test_complex_numbers_are_compared_in_complex128() -> None:
    net, x = fxprune.capture(Turned(), torch.ones(2, 3)), (torch.ones(2, 3),)
    right = outputs_of(net, x)
    outputs = (right, right + 1e-3), (right, right + 1e-3)

    def in_float64() -> fx.GraphModule:
        return cast_numbers(copy.deepcopy(net), torch.float64)

    assert verified(net, net, (x, x), outputs, in_float64) == 0
