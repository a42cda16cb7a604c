"""Numbers of paths against Python's integers and fractions: by hand, path by path, at any depth and scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision
from lowering.agreement import lowered
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from fxprune.graph import ChannelGraph
from fxprune.paths.count import flow, log_paths, reach

RESOLUTIONS: tuple[Literal["spatial", "channel"], ...] = ("spatial", "channel")


def bools(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def plain(*sizes: int, bias: bool = False) -> nn.Sequential:
    """A linear network without biases; the weights are named 0.weight, 1.weight, ..."""
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*[nn.Linear(i, o, bias=bias) for i, o in pairs])


def random_masks(graph: ChannelGraph, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(kernels.shape, generator=generator) < density
        for name, kernels in graph.kernels.items()
    }


# ---------------------------------------------------------------- the toys of the literature sheet
def test_toy_m() -> None:
    """Linear 2-3-2-1 with masks: three paths, derivatives in thirds."""
    graph = lowered(plain(2, 3, 2, 1), torch.ones(1, 2))
    masks = {
        "0.weight": bools([[1, 1], [1, 0], [0, 0]]),
        "1.weight": bools([[1, 1, 1], [0, 0, 1]]),
        "2.weight": bools([[1, 1]]),
    }
    third = 1 / 3
    expected = {
        "0.weight": [[third, third], [third, third], [2 * third, 2 * third]],
        "1.weight": [[2 * third, third, 0], [2 * third, third, 0]],
        "2.weight": [[1.0, 0]],
    }
    for resolution in RESOLUTIONS:
        result = flow(graph, masks, resolution=resolution, dtype=torch.float64)
        assert result.log_total == pytest.approx(math.log(3), rel=1e-12)
        for name, rows in expected.items():
            torch.testing.assert_close(result.gradients[name], torch.tensor(rows, dtype=torch.float64))
        found = reach(graph, masks, resolution=resolution)
        assert [int(mask.sum()) for mask in found.values()] == [3, 2, 1]


class ToyR(nn.Module):
    """h = F1 x; y = F3 F2 h + h; out = F4 y."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.f3 = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.f4 = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f1(x)
        return self.f4(self.f3(self.f2(x)) + x)


def test_toy_r() -> None:
    """Branch and skip meet at one scale: 20 paths (not 32), and 8 (not 20) with masks."""
    graph = lowered(ToyR(), torch.ones(1, 2))
    assert flow(graph, {}, dtype=torch.float64).log_total == pytest.approx(math.log(20), rel=1e-12)
    masks = {"f2.weight": bools([[1, 1], [1, 0]]), "f3.weight": bools([[0, 1], [0, 1]])}
    weights = {name: masks.get(name, torch.ones(k.shape)) for name, k in graph.kernels.items()}
    result = flow(graph, weights, dtype=torch.float64)
    assert result.log_total == pytest.approx(math.log(8), rel=1e-12)
    expected = {
        "f1.weight": [[0.375, 0.375], [0.125, 0.125]],
        "f2.weight": [[0.0, 0.0], [0.5, 0.5]],
        "f3.weight": [[0.5, 0.25], [0.5, 0.25]],
        "f4.weight": [[0.5, 0.5]],
    }
    for name, rows in expected.items():
        torch.testing.assert_close(result.gradients[name], torch.tensor(rows, dtype=torch.float64))
    assert sum(int(mask.sum()) for mask in reach(graph, masks).values()) == 9


@pytest.mark.parametrize(
    ("pool", "counting", "paths"),
    [
        (nn.Identity(), "sum", 100),
        (nn.MaxPool2d(2), "sum", 36),
        (nn.AvgPool2d(2), "sum", 100),
        (nn.AvgPool2d(2), "mean", 25),
        (nn.MaxPool2d(2), "mean", 36),
        (nn.AdaptiveAvgPool2d(2), "mean", 25),
        (nn.AdaptiveAvgPool2d(1), "sum", 100),
    ],
)
def test_toy_p(pool: nn.Module, counting: Any, paths: int) -> None:
    """A 3x3 kernel on a padded 4x4 image: maximum, sum and mean of the counts."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), pool)
    graph = lowered(model, torch.ones(2, 1, 4, 4))
    result = flow(graph, {}, pool=counting, dtype=torch.float64)
    assert result.log_total == pytest.approx(math.log(paths), rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_toy_b(bias: bool) -> None:
    """A bias is no path: the second channel, which only a bias feeds, stays without."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=bias), nn.Conv2d(2, 1, 1, bias=bias))
    graph = lowered(model, torch.ones(1, 1, 1, 1))
    masks = {"0.weight": bools([[[[1]]], [[[0]]]])}
    assert flow(graph, masks).log_total == pytest.approx(0.0, abs=1e-7)
    assert reach(graph, masks)["1.weight"].flatten().tolist() == [True, False]


# ---------------------------------------------------------------- integers of any size
class Blocks(nn.Module):
    """Residual blocks of linear layers, some with a projection on the skip, some with a concatenation."""

    def __init__(self, width: int, kinds: Sequence[str], last: int) -> None:
        super().__init__()
        self.kinds = list(kinds)
        self.stem = nn.Linear(width, width, bias=False)
        self.one = nn.ModuleList(nn.Linear(width, width + 1, bias=False) for _ in kinds)
        self.two = nn.ModuleList(
            nn.Linear(width + 1, width - 1 if kind == "concat" else width, bias=False) for kind in kinds
        )
        self.skip = nn.ModuleList(
            nn.Linear(width, width, bias=False) if kind == "project" else nn.Identity() for kind in kinds
        )
        self.head = nn.Linear(width, last, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, one, two, skip in zip(self.kinds, self.one, self.two, self.skip, strict=True):
            y = two(one(x).relu())
            x = torch.cat([x[..., :1], y], -1) if kind == "concat" else skip(x) + y
        return self.head(x)


def exact(weight: Tensor) -> np.ndarray:
    """The very numbers of a matrix: integers for a mask, fractions for weights."""
    number = int if weight.dtype == torch.bool else Fraction
    return np.array([[number(v) for v in row] for row in weight.tolist()], dtype=object)


def counted(model: Blocks, weights: Mapping[str, Tensor]) -> tuple[Any, dict[str, np.ndarray]]:
    """R and dR / dM in exact arithmetic: forwards and backwards by hand, without torch."""
    m = {name: exact(weight) for name, weight in weights.items()}
    ones = np.array([1] * m["stem.weight"].shape[1], dtype=object)
    states = [m["stem.weight"].dot(ones)]
    for i, kind in enumerate(model.kinds):
        x = states[-1]
        y = m[f"two.{i}.weight"].dot(m[f"one.{i}.weight"].dot(x))
        if kind == "concat":
            states.append(np.concatenate([x[:1], y]))
        else:
            states.append(y + (m[f"skip.{i}.weight"].dot(x) if kind == "project" else x))
    out = m["head.weight"].dot(states[-1])
    g = np.array([1] * len(out), dtype=object)
    slopes = {"head.weight": np.outer(g, states[-1])}
    g = g.dot(m["head.weight"])
    for i, kind in reversed(list(enumerate(model.kinds))):
        x = states[i]
        branch = g[1:] if kind == "concat" else g
        middle = branch.dot(m[f"two.{i}.weight"])
        slopes[f"two.{i}.weight"] = np.outer(branch, m[f"one.{i}.weight"].dot(x))
        slopes[f"one.{i}.weight"] = np.outer(middle, x)
        below = middle.dot(m[f"one.{i}.weight"])
        if kind == "concat":
            below[0] += g[0]
        elif kind == "project":
            slopes[f"skip.{i}.weight"] = np.outer(g, x)
            below = below + g.dot(m[f"skip.{i}.weight"])
        else:
            below = below + g
        g = below
    slopes["stem.weight"] = np.outer(g, ones)
    return sum(out), slopes


def logarithm(x: int | Fraction) -> float:
    return math.log(x.numerator) - math.log(x.denominator)


def derivatives(slope: np.ndarray, total: int | Fraction) -> Tensor:
    return torch.tensor([[float(v / total) for v in row] for row in slope], dtype=torch.float64)


KINDS = ("plain", "project", "concat")


def random_blocks(seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    depth, width = (int(torch.randint(low, 8, (), generator=generator)) for low in (1, 2))
    kinds = [KINDS[i] for i in torch.randint(0, 3, (depth,), generator=generator).tolist()]
    return Blocks(width, kinds, 3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("density", [1.0, 0.6, 0.3])
def test_random_residual_networks(density: float, seed: int) -> None:
    model = random_blocks(seed)
    graph = lowered(model, torch.ones(2, model.stem.in_features))
    masks = random_masks(graph, density, seed)
    total, slopes = counted(model, masks)
    for resolution in RESOLUTIONS:
        result = flow(graph, masks, resolution=resolution, dtype=torch.float64)
        found = reach(graph, masks, resolution=resolution)
        if total == 0:
            assert result.log_total == -math.inf
        else:
            assert result.log_total == pytest.approx(logarithm(total), abs=1e-12, rel=1e-14)
        for name, slope in slopes.items():
            wanted = torch.tensor([[bool(v) for v in row] for row in slope]) & masks[name]
            assert torch.equal(found[name], wanted if total else torch.zeros_like(wanted)), name
            expected = derivatives(slope, total) if total else torch.zeros(wanted.shape, dtype=torch.float64)
            torch.testing.assert_close(result.gradients[name], expected, rtol=1e-12, atol=0.0)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["double", "single"]
)
def test_weights_of_any_scale(dtype: torch.dtype, tolerance: float) -> None:
    """Layers of 1e-30 beside layers of 1e30, on branch and skip: exact to the precision of the type."""
    for seed in range(6):
        model = random_blocks(seed)
        graph = lowered(model, torch.ones(2, model.stem.in_features))
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for i, (name, mask) in enumerate(random_masks(graph, 0.8, seed).items()):
            scale = (1e-30, 1e30, 1.0)[(i + seed) % 3]
            weights[name] = mask * scale * (0.5 + torch.rand(mask.shape, generator=generator))
        total, slopes = counted(model, weights)
        result = flow(graph, weights, dtype=dtype)
        assert result.log_total == pytest.approx(logarithm(total), abs=tolerance)
        for name, slope in slopes.items():
            # Shares of R: a derivative itself may leave the range where its weight is zero.
            share = result.gradients[name].double() * weights[name]
            expected = derivatives(slope * exact(weights[name]), total)
            torch.testing.assert_close(share, expected, rtol=tolerance, atol=1e-20)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_never_infinite_nor_undefined(scale: float, dtype: torch.dtype) -> None:
    """For any masks, any scale of the weights, and any depth of the network."""
    model = Blocks(6, KINDS * 8, 3)
    graph = lowered(model, torch.ones(1, 6))
    for density in (0.9, 0.3, 0.1, 0.0):
        for seed in range(2):
            masks = random_masks(graph, density, seed)
            weights = {name: mask.to(dtype) * scale for name, mask in masks.items()}
            if seed == 1:  # a branch that is dead, and one that is dense
                weights["two.3.weight"] = torch.zeros_like(weights["two.3.weight"])
                weights["two.4.weight"] = torch.full_like(weights["two.4.weight"], 1 / scale)
            result = flow(graph, weights, dtype=dtype)
            assert not math.isnan(result.log_total)
            assert result.log_total < math.inf
            for name, gradient in result.gradients.items():
                assert bool(torch.isfinite(gradient).all()), (name, density, seed)
                assert bool((gradient >= 0).all()), (name, density, seed)
                if result.log_total == -math.inf:
                    assert not bool(gradient.any())


def test_no_path_at_all() -> None:
    """R = 0: ln R is minus infinity and no derivative is told from another."""
    model = Blocks(4, ["project", "plain"], 2)
    graph = lowered(model, torch.ones(1, 4))
    masks = {"head.weight": torch.zeros(2, 4)}
    for resolution in RESOLUTIONS:
        result = flow(graph, masks, resolution=resolution)
        assert result.log_total == -math.inf
        assert not bool(result.gradients["head.weight"].any())
        found = reach(graph, {"head.weight": torch.zeros(2, 4, dtype=torch.bool)}, resolution=resolution)
        assert not any(bool(mask.any()) for mask in found.values())


@pytest.mark.slow
def test_beyond_the_range_of_floats() -> None:
    """A hundred residual blocks have more than 10^308 paths: exact to the precision of the type."""
    model = Blocks(40, ["project" if i % 10 == 0 else "plain" for i in range(100)], 5)
    graph = lowered(model, torch.ones(1, 40))
    for density in (1.0, 0.4):
        masks = random_masks(graph, density, 0)
        total, slopes = counted(model, masks)
        assert density < 1 or total > 10**308
        expected = {
            name: derivatives(slopes[name], total)
            for name in ("stem.weight", "one.0.weight", "two.49.weight", "one.99.weight", "head.weight")
        }
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
            result = flow(graph, masks, dtype=dtype)
            assert result.log_total == pytest.approx(logarithm(total), abs=tolerance)
            for name, slope in expected.items():
                gradient = result.gradients[name].double()
                torch.testing.assert_close(gradient, slope, rtol=tolerance, atol=0.0)


@pytest.mark.slow
def test_depth_of_resnet_152() -> None:
    """torchvision's own class with the 50 blocks of a ResNet-152, narrow ones: its paths as an integer.

    Periodic and dense, all entries of a map are alike, so that one integer per map is the exact count.
    """
    model = torchvision.models.ResNet(Bottleneck, [3, 8, 36, 3], num_classes=10, width_per_group=4)
    graph = lowered(model, torch.ones(1, 3, 224, 224))
    value, channels = 3 * 49, 64  # the stem; a maximum of equal counts is that count
    for planes, blocks in ((64, 3), (128, 8), (256, 36), (512, 3)):
        middle = planes * 4 // 64
        for block in range(blocks):
            branch = value * channels * 9 * middle * middle
            value = branch + (value * channels if block == 0 else value)
            channels = 4 * planes
    total = value * 49 * channels * 10  # the last map is 7 x 7
    assert total > 10**308
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
        result = flow(graph, {}, resolution="channel", dtype=dtype)
        assert result.log_total == pytest.approx(math.log(total), abs=tolerance)


# ---------------------------------------------------------------- convolutions: entry by entry
@pytest.mark.parametrize("seed", range(4))
def test_convolutions_path_by_path(seed: int) -> None:
    """conv - conv - linear on 4 x 4 images, every path walked one at a time."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, bias=False),
        nn.Conv2d(2, 2, 2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(8, 2, bias=False),
    )
    graph = lowered(model, torch.ones(1, 2, 4, 4))
    masks = random_masks(graph, 0.4, seed)
    first, second, last = (masks[name].tolist() for name in ("0.weight", "1.weight", "3.weight"))
    paths = 0
    used: set[tuple[str, tuple[int, ...]]] = set()
    for label, o, y, x in itertools.product(range(2), range(2), range(2), range(2)):
        if not last[label][o * 4 + y * 2 + x]:
            continue
        for m, dy, dx in itertools.product(range(2), range(2), range(2)):
            if not second[o][m][dy][dx]:
                continue
            for i, ey, ex in itertools.product(range(2), range(3), range(3)):
                inside = 0 <= 2 * y + dy + ey - 1 < 4 and 0 <= 2 * x + dx + ex - 1 < 4
                if first[m][i][ey][ex] and inside:
                    paths += 1
                    used |= {("0.weight", (m, i, ey, ex)), ("1.weight", (o, m, dy, dx))}
                    used.add(("3.weight", (label, o * 4 + y * 2 + x)))
    result = flow(graph, masks, dtype=torch.float64)
    assert (round(math.exp(result.log_total)) if paths else 0) == paths
    found = reach(graph, masks)
    assert {(name, tuple(place)) for name in found for place in found[name].nonzero().tolist()} == used


@pytest.mark.parametrize("resolution", ["spatial", "channel"])
def test_the_number_of_paths_alone_is_that_of_the_flow(resolution: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)).eval()
    graph = lowered(net, torch.ones(1, 3, 8, 8))
    for density in (1.0, 0.5, 0.0):
        weights = {name: (torch.rand(k.shape) < density).double() for name, k in graph.kernels.items()}
        wanted = flow(graph, weights, resolution=resolution, dtype=torch.float64).log_total
        assert log_paths(graph, weights, resolution=resolution) == wanted
