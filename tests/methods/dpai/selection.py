"""The definition of the top-k of scores, and scores with many ties."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.select import select

STEPS = 80


def selected(scores: Mapping[str, Tensor], layers: Mapping[str, int]) -> Masks:
    """The definition; ``-inf`` is for weights that may not be kept."""
    within = {name: score > -torch.inf for name, score in scores.items()}
    finite = {name: score.where(within[name], 0.0) for name, score in scores.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    return select(finite, Budget(sum(layers.values()), sizes, dict(layers)), within=within)


def drawn(generator: torch.Generator, shape: tuple[int, ...], levels: int, is_coarse: bool) -> Tensor:
    values = torch.rand(shape, generator=generator)
    return (values * levels).round() / levels if is_coarse else values
