"""Integer inputs: paths start where they are looked up; masks of ones and zeros are no paths."""

from __future__ import annotations

import torch
from oracle import effective_parameters, random_masks
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach


class Tokens(nn.Module):
    """Tokens and a mask of positions that count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.one, self.two = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.one(self.table(tokens)).relu()
        return self.two((x * mask.unsqueeze(-1)).sum(1))


def test_tokens_start_paths_and_masks_do_not() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    inputs = (torch.randint(11, (2, 5)), torch.ones(2, 5, dtype=torch.int64))
    graph = lower(capture(model, inputs))
    assert not graph.opaque
    for seed in range(3):
        masks = random_masks(model, 0.3, seed)
        found, wanted = reach(graph, masks), effective_parameters(model, inputs, masks)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_integers_that_are_numbers_start_paths() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, counts: Tensor) -> Tensor:
            return self.head(counts.float())

    graph = lower(capture(Counts(), torch.ones(2, 4, dtype=torch.int64)))
    assert reach(graph, {})["head.weight"].all()


def test_integers_beside_real_numbers_start_no_paths() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x) + shift)
            return y

    inputs = torch.ones(2, 4), torch.ones(2, 3, dtype=torch.int64)
    graph = lower(capture(Scaled(), inputs))
    none = {"first.weight": torch.zeros(3, 4, dtype=torch.bool)}
    assert not reach(graph, none)["last.weight"].any()
