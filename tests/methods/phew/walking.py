"""Walks of a problem in both directions, and how often each weight is on them."""

import torch

from fxprune.methods import Problem
from fxprune.methods.phew.walks import Visits, Walks

PLAIN = """mlp conv_chain residual projection dense split shuffle grouped multiplier strided flatten
transposed pixel_shuffle two_inputs two_outputs conv1d mixer""".split()


def walks_of(question: Problem) -> Walks:
    return Walks(question.graph, question.weights)


def both(walks: Walks, number: int) -> tuple[Visits, Visits]:
    generator = torch.Generator().manual_seed(0)
    return walks.forward(torch.arange(number), generator), walks.backward(torch.arange(number), generator)


def frequencies(visits: Visits, name: str, shape: torch.Size) -> torch.Tensor:
    counts = torch.bincount(visits.weights[name], minlength=shape.numel())
    return (counts / len(visits.complete)).view(shape)
