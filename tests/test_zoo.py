"""The zoo's networks are those of the papers: counts of parameters, tensors, paths and operations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxprune import zoo
from fxprune.capture import capture
from fxprune.channels.counts import masked_macs
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.paths.count import flow
from fxprune.sparsity.budget import erk_densities

Net = Callable[[], nn.Module]

SIZES = {zoo.resnet20: 32, zoo.vgg19_bn: 32, zoo.resnet18_tiny: 64}
GRAPHS: dict[Net, ChannelGraph] = {}


def graph_of(make: Net) -> ChannelGraph:
    if make not in GRAPHS:
        GRAPHS[make] = lower(capture(make(), torch.ones(1, 3, SIZES[make], SIZES[make])))
    return GRAPHS[make]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("make", "total", "prunable", "tensors", "norms", "biases"),
    [
        (zoo.resnet20, 272_474, 270_896, 22, 1_568, 10),
        (zoo.vgg19_bn, 20_086_692, 20_070_080, 17, 11_008, 5_604),
        (zoo.resnet18_tiny, 11_271_232, 11_261_632, 21, 9_600, 0),
    ],
)
def test_parameter_counts(
    make: Net, total: int, prunable: int, tensors: int, norms: int, biases: int
) -> None:
    net, graph = make(), graph_of(make)
    of_norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    others = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None]
    assert sum(p.numel() for p in net.parameters()) == total
    assert graph.prunable == prunable
    assert len(graph.kernels) == tensors
    assert sum(p.numel() for p in of_norms) == norms
    assert sum(m.bias.numel() for m in others) == biases
    assert total == prunable + norms + biases


def test_tensors_of_resnet20_come_in_the_order_of_the_tables() -> None:
    shapes = [tuple(kernels.shape) for kernels in graph_of(zoo.resnet20).kernels.values()]
    narrow, wide, widest = (16, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3)
    assert shapes == [
        (16, 3, 3, 3), *[narrow] * 6,
        (32, 16, 3, 3), wide, (32, 16, 1, 1), *[wide] * 4,
        (64, 32, 3, 3), widest, (64, 32, 1, 1), *[widest] * 4,
        (10, 64),
    ]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("make", "average", "total"),
    [
        (zoo.resnet20, 109.4383, 113.5972),
        (zoo.vgg19_bn, 126.7067, 128.0930),
        (zoo.resnet18_tiny, 130.4622, 134.6211),
    ],
)
def test_paths_of_the_dense_networks(make: Net, average: float, total: float) -> None:
    assert flow(graph_of(make), {}, pool="mean", dtype=torch.float64).log_total == pytest.approx(
        average, abs=1e-4
    )
    assert flow(graph_of(make), {}, pool="sum", dtype=torch.float64).log_total == pytest.approx(
        total, abs=1e-4
    )


@pytest.mark.parametrize(
    ("make", "compression", "kept", "macs", "flops"),
    [
        (zoo.resnet20, 0.5, 85_674, 23_281_152, 23_682_570),
        (zoo.resnet20, 1, 27_104, 7_240_256, 7_641_674),
        (zoo.resnet20, 1.5, 8_582, 2_243_648, 2_645_066),
        (zoo.resnet20, 2, 2_718, 712_890, 1_114_308),
        (zoo.resnet20, 2.5, 866, 226_727, 628_145),
        (zoo.resnet20, 3, 282, 77_325, 478_743),
        (zoo.vgg19_bn, 0.5, 6_346_720, 219_436_528, 220_345_940),
        (zoo.vgg19_bn, 1, 2_007_018, 86_822_064, 87_731_476),
        (zoo.vgg19_bn, 1.5, 634_682, 27_824_183, 28_733_595),
        (zoo.vgg19_bn, 2, 200_708, 9_547_697, 10_457_109),
        (zoo.resnet18_tiny, 0.5, 3_561_248, 1_431_951_488, 1_436_866_688),
        (zoo.resnet18_tiny, 1, 1_126_170, 515_550_348, 520_465_548),
        (zoo.resnet18_tiny, 1.5, 356_137, 169_210_873, 174_126_073),
        (zoo.resnet18_tiny, 2, 112_624, 54_685_594, 59_600_794),
    ],
)
def test_operations_under_the_published_erk_budgets(
    make: Net, compression: float, kept: int, macs: int, flops: int
) -> None:
    """The papers round per layer: int(sparsity * n) weights go. Norms cost 2, biases 1 per output entry."""
    graph = graph_of(make)
    shapes = {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}
    layers = {
        name: math.prod(shapes[name]) - int((1 - density) * math.prod(shapes[name]))
        for name, density in erk_densities(shapes, 10**-compression).items()
    }
    found = sum(masked_macs(kernels, layers[name]) for name, kernels in graph.kernels.items())
    rest = {zoo.resnet20: 401_408 + 10, zoo.vgg19_bn: 606_208 + 303_204, zoo.resnet18_tiny: 4_915_200}
    assert sum(layers.values()) == kept
    assert found == macs
    assert found + rest[make] == flops


@pytest.mark.slow
def test_networks_run_and_start_from_the_global_generator() -> None:
    for make, size in SIZES.items():
        torch.manual_seed(3)
        net = make()
        torch.manual_seed(3)
        again = make()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
        assert net.eval()(torch.ones(2, 3, size, size)).isfinite().all()
