"""Numbers of active paths through functions, against slopes and outputs worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxprune.methods.px.active_paths import Activity
from fxprune.paths.scaled import Scaled


def real(activity: Activity, y: torch.Tensor) -> torch.Tensor:
    """The second number of y."""
    number = activity.paths[y]
    return number.values.double() * 2.0**number.power


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (F.relu, lambda z: (z > 0).double()),
        (F.gelu, lambda z: 0.5 * (1 + torch.erf(z / 2**0.5))),
        (F.silu, torch.sigmoid),
        (F.hardswish, lambda z: (z + 3).clamp(0, 6) / 6),
        (lambda z: F.leaky_relu(z, 0.2), lambda z: torch.where(z > 0, 1.0, 0.2)),
        (torch.tanh, lambda z: torch.tanh(z) / z),
        (torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
        (lambda z: z.clone().relu_(), lambda z: (z > 0).double()),
    ],
    ids=["relu", "gelu", "silu", "hardswish", "leaky", "tanh", "sigmoid", "in place"],
)
def test_gains_of_activations(
    activation: Callable[..., torch.Tensor], gain: Callable[..., torch.Tensor]
) -> None:
    z = torch.linspace(-4, 4, 30)
    with Activity({}) as activity:
        activity.paths[z] = Scaled(torch.full_like(z, 3.0), 0, 0)
        y = activation(z)
        found = real(activity, y)
    assert torch.allclose(found, 3.0 * gain(z.double()).double().square(), atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (lambda z: F.leaky_relu(z, 0.2), 0.2),
        (lambda z: F.leaky_relu(z, 3.0), 1.0),
        (F.hardtanh, 1.0),
        (F.relu6, 0.0),
        (F.gelu, 0.5),
        (torch.sigmoid, 0.25),
    ],
    ids=["leaky", "steep", "hardtanh", "relu6", "gelu", "sigmoid"],
)
def test_at_exactly_zero_the_smaller_slope_counts(
    activation: Callable[..., torch.Tensor], gain: float
) -> None:
    for z in (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor(0.0)):
        with Activity({}) as activity:
            activity.paths[z] = Scaled(torch.full_like(z, 3.0), 0, 0)
            found = real(activity, activation(z))
        assert torch.allclose(found[z == 0], torch.tensor(3.0 * gain**2, dtype=torch.float64), atol=2e-3)


def test_values_times_gains_are_the_network() -> None:
    # One path per output, and squares of weights in place of masks: squared outputs come out.
    torch.manual_seed(0)
    first, second = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 1, 1)
    first[:, :, 0] = first[:, :, 2] = first[:, :, 1, ::2] = 0
    x = torch.randn(2, 4, 4, 4)
    with Activity({first: first.square(), second: second.square()}) as activity, torch.no_grad():
        activity.start(x)
        h = F.hardswish(F.conv2d(x, first, padding=1, groups=4))
        h = F.max_pool2d(F.gelu(F.batch_norm(h, torch.zeros(4), torch.ones(4), eps=0)), 2)
        y = F.leaky_relu(F.conv2d(h, second, groups=4).transpose(2, 3).flatten(2))
        found = real(activity, y)
    assert torch.allclose(found, y.double().square(), rtol=1e-4, atol=1e-7)


def test_attention_passes_values() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4)
    with Activity({}) as activity, torch.no_grad():
        activity.start((q, k, v))
        y = (q @ k.mT).softmax(-1) @ v
        found = real(activity, y)
    weights = (q @ k.mT).softmax(-1).double()
    assert torch.allclose(found, weights.square() @ v.double().square())


@pytest.mark.parametrize("exponent", [-70, 60])
def test_activity_scales_with_the_square_of_the_data(exponent: int) -> None:
    # Squares of these leave float32; a residual sum and a product meet numbers of other sizes.
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    torch.manual_seed(1)
    weights = [net[0].weight, net[2].weight]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    numbers = []
    for inputs in (x, x * 2.0**exponent):
        with Activity({w: torch.ones_like(w) for w in weights}) as activity, torch.no_grad():
            activity.start(inputs)
            numbers.append(activity.paths[net(inputs)])
    small, large = numbers
    assert torch.equal(small.values, large.values)
    assert large.power - small.power == 2 * exponent


def test_sums_of_very_different_numbers() -> None:
    # y = x + b x with a deep, dense b: the branch has all the paths but for one part in 10^60.
    x = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(8, 8)
    none = torch.zeros(8, 8)
    with Activity({ones: ones, none: none}) as activity, torch.no_grad():
        activity.start(x)
        branch = x
        for _ in range(70):
            branch = branch @ ones / 8
        left, right = activity.paths[x + branch], activity.paths[branch]
        unlit = activity.paths[x * 2.0**-70 + x @ none]
    assert left.power == right.power
    assert torch.allclose(left.values, right.values)
    assert torch.allclose(unlit.values * 2.0**unlit.power, x.square())
