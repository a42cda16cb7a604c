"""Kernels, nodes and multiply-adds of one layer, against counts done by hand."""

import torch
from torch import nn

import fxprune
from fxprune.channels.counts import count_kernels, count_nodes, masked_macs
from fxprune.graph import KernelSet


def kernels_of(layer: nn.Module, *shape: int) -> KernelSet:
    graph = fxprune.lower(fxprune.capture(nn.Sequential(layer), torch.ones(2, *shape)))
    (kernels,) = graph.kernels.values()
    return kernels


def test_linear() -> None:
    kernels = kernels_of(nn.Linear(3, 2), 3)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert count_kernels(mask) == 2
    assert count_nodes(kernels, mask) == 1
    assert kernels.macs == 6
    assert masked_macs(kernels, 2) == 2


def test_convolution() -> None:
    kernels = kernels_of(nn.Conv2d(2, 3, 3), 2, 5, 5)
    mask = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, :2] = mask[0, 1, 2, 2] = mask[2, 1, 1, 1] = True
    assert count_kernels(mask) == 3
    assert count_nodes(kernels, mask) == 2
    assert kernels.macs == 9 * 54
    assert masked_macs(kernels, 4) == 9 * 4


def test_grouped_convolution() -> None:
    kernels = kernels_of(nn.Conv1d(4, 6, 1, groups=2), 4, 7)
    mask = torch.zeros(6, 2, 1, dtype=torch.bool)
    mask[3:] = True
    assert count_nodes(kernels, mask) == 3
    assert count_kernels(mask) == 6
    assert kernels.macs == 7 * 12


def test_transposed_grouped_convolution() -> None:
    kernels = kernels_of(nn.ConvTranspose2d(4, 6, 2, groups=2), 4, 3, 3)
    assert kernels.out_space.size == 6
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[0, 1, 0, 0] = mask[1, 1, 1, 1] = True  # both lead to channel 1
    assert count_nodes(kernels, mask) == 1
    mask[2, 1, 0, 0] = True  # channel 1 of the second group
    assert count_nodes(kernels, mask) == 2
    assert count_nodes(kernels, torch.ones_like(mask)) == 6
