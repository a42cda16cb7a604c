"""Equal shares of lines, against ranks and the selection over them."""

import pytest
import torch

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.lines import best_of_lines, split_by_places
from fxprune.sparsity.select import select


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank of every score in its line, by sorting."""
    order = scores.argsort(dim=1, stable=True, descending=True)
    places = torch.arange(scores.shape[1], dtype=torch.float64).expand(scores.shape)
    return 1 - (torch.empty_like(places).scatter_(1, order, places) + 0.5) / scores.shape[1]


def tied(lines: int, length: int, seed: int) -> torch.Tensor:
    """Scores of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (lines, length), generator=generator).float()


@pytest.mark.parametrize("number", [0, 1, 6, 7, 20, 34, 35])
@pytest.mark.parametrize("seed", range(3))
def test_lines_keep_what_selection_by_ranks_keeps(number: int, seed: int) -> None:
    scores = tied(5, 7, seed)
    expected = select({"a": ranks(scores)}, Budget(number, {"a": 35}))["a"]
    assert torch.equal(best_of_lines(scores, number), expected)


@pytest.mark.parametrize("total", [0, 1, 4, 9, 17, 23, 40, 46])
def test_layers_share_what_selection_by_ranks_gives_them(total: int) -> None:
    lines = {"a": (3, 8), "b": (4, 4), "c": (2, 3)}
    scores = {name: ranks(tied(*sides, seed=0)) for name, sides in lines.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    masks = select(scores, Budget(total, sizes))
    assert split_by_places(lines, total) == {name: int(mask.sum()) for name, mask in masks.items()}
