"""A small chain of convolutions, its circuit, and the figures of its masks."""

from typing import Any

import torch
from torch import nn

from fxprune.channels.counts import count_kernels, count_nodes
from fxprune.methods import Problem
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow, reach
from fxprune.sparsity.masks import Masks
from methods.problems import asked


def small() -> tuple[nn.Module, torch.Tensor]:
    """A chain of four convolutions and a head, 12 channels wide."""
    convs = [nn.Conv2d(a, 12, 3, padding=1, bias=False) for a in (3, 12, 12, 12)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5, bias=False))
    return net, torch.ones(1, 3, 8, 8)


def figures(question: Problem, masks: Masks) -> tuple[int, int, float]:
    """Effective nodes and kernels, and ln paths, at spatial resolution."""
    effective = reach(question.graph, masks)
    edges = {name: mask.double() for name, mask in masks.items()}
    return (
        sum(count_nodes(question.graph.kernels[name], mask) for name, mask in effective.items()),
        sum(count_kernels(mask) for mask in effective.values()),
        flow(question.graph, edges, dtype=torch.float64).log_total,
    )


def parts() -> tuple[Problem, Any, Masks, dict[str, torch.Tensor]]:
    """A question, its circuit, and counts and caps of a network of four convolutions."""
    torch.manual_seed(0)
    question = asked(*small(), 0.9)
    found = circuit(question.graph)
    assert found is not None
    caps = {name: found.dense(name) for name in found.kernels}
    generator = torch.Generator().manual_seed(0)
    return (
        question,
        found,
        {n: (torch.rand(c.shape, generator=generator) < 0.3).double() for n, c in caps.items()},
        caps,
    )
