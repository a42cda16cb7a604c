"""Channels that paths use: the rows and columns of the weights that `reach` marks, at little memory."""

from __future__ import annotations

import pytest
import torch
from lowering.agreement import lowered
from nets import NETS, lowered_net
from peak import Peak
from thinning import one_in
from torch import Tensor, nn

from fxprune.channels.by_channel import labels_by_weight
from fxprune.graph import ChannelGraph
from fxprune.paths.count import reach
from fxprune.paths.program import Resolution, compile_bound
from fxprune.paths.used import layers_of, used_channels, used_layers


def marked(graph: ChannelGraph, effective: dict[str, Tensor]) -> dict[str, tuple[list[int], list[int]]]:
    """The numbers of the rows and columns of effective weights, one weight after the other."""
    found = {}
    for name, kernels in graph.kernels.items():
        numbers = labels_by_weight(
            torch.arange(kernels.out_space.size), torch.arange(kernels.in_space.size), kernels
        )
        rows, columns = (sorted(set(of[effective[name]].tolist())) for of in numbers)
        found[name] = rows, columns
    return found


@pytest.mark.parametrize(("name", "resolution"), one_in(2, sorted(NETS), ["spatial", "channel"]))
def test_rows_and_columns_of_effective_weights(name: str, resolution: Resolution) -> None:
    graph = lowered_net(name)
    for density in (0.05, 0.2, 0.6):
        masks = {name: torch.rand(kernels.shape) < density for name, kernels in graph.kernels.items()}
        masks.pop(next(iter(masks)))  # one that is missing counts as dense
        used = used_channels(graph, masks, resolution=resolution)
        got = {
            name: tuple(side.nonzero().flatten().tolist() for side in sides) for name, sides in used.items()
        }
        effective = reach(graph, masks, resolution=resolution)
        assert got == marked(graph, effective)
        alive = {name for name, weights in effective.items() if bool(weights.any())}
        assert used_layers(graph, masks, resolution=resolution) == alive


def test_no_path_at_all() -> None:
    graph = lowered(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.ones(1, 2))
    used = used_channels(graph, {"0.weight": torch.zeros(3, 2, dtype=torch.bool)})
    assert not any(bool(side.any()) for sides in used.values() for side in sides)
    assert used_layers(graph, {"0.weight": torch.zeros(3, 2, dtype=torch.bool)}) == set()


def test_names_and_shapes_are_checked() -> None:
    graph = lowered(nn.Sequential(nn.Linear(2, 3)), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no kernel is named 'x'"):
        used_channels(graph, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="is not the parameter's"):
        used_channels(graph, {"0.weight": torch.ones(2, 3, dtype=torch.bool)})


def test_memory_is_that_of_a_few_layers() -> None:
    """Twelve layers of 256 KiB in float32: floats of one or two at a time, bytes of all."""
    graph = lowered(nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)]), torch.ones(1, 256))
    masks = {name: torch.rand(kernels.shape) < 0.5 for name, kernels in graph.kernels.items()}
    with Peak() as peak:
        used_channels(graph, masks)
    layer = 256 * 256 * 4
    assert peak.peak < 12 * layer / 4 + 3 * layer


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_bound_finds_no_path_that_is_none(name: str) -> None:
    graph = lowered_net(name)
    for density in (0.05, 0.2, 0.6):
        masks = {name: torch.rand(kernels.shape) < density for name, kernels in graph.kernels.items()}
        effective = reach(graph, masks)
        assert layers_of(graph, masks, compile_bound(graph)) <= {
            name for name, weights in effective.items() if bool(weights.any())
        }


def test_the_bound_reads_inner_taps_alone() -> None:
    """A padded convolution: its middle tap is inside everywhere, and positions stay alike."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 1, 5, stride=2, padding=2))
    graph = lowered(net, torch.ones(1, 2, 9, 9))
    program = compile_bound(graph)
    assert all(shape[2:] == (1, 1) for shape in program.shapes.values())
    border = torch.ones(3, 2, 3, 3, dtype=torch.bool)
    border[:, :, 1, 1] = False
    assert layers_of(graph, {"0.weight": border}, program) == set()
    assert layers_of(graph, {"0.weight": ~border}, program) == {"0.weight", "1.weight"}
    assert used_layers(graph, {"0.weight": border}) == {"0.weight", "1.weight"}
