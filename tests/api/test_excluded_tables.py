"""Tables, such as embeddings, and layers that read them are excluded like any other layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune

TOKENS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))


class Stream(nn.Module):
    """An embedding, two branches that are added to it, and a layer that reads all."""

    def __init__(self, *, norm: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 16)
        self.f1, self.f2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.g1, self.g2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.out = nn.Linear(16, 20, bias=False)
        if tied:
            self.out.weight = self.e.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.e(i)
        x = x + self.f2(self.f1(x).relu())
        out: torch.Tensor = self.out(self.norm(x + self.g2(self.g1(x).relu())))
        return out


def _pruned(net: nn.Module, *exclude: str) -> nn.Module:
    return fxprune.apply(
        net.eval(),
        "magnitude",
        0.5,
        granularity="channel",
        exclude=exclude,
        example_inputs=TOKENS,
        progress=False,
    )


def _widths(net: nn.Module) -> set[int]:
    """The widths that compaction leaves the stream, after a look at its outputs."""
    small = fxprune.compact(net, TOKENS)
    assert torch.allclose(small(TOKENS), net(TOKENS), atol=1e-5)
    sizes = dict(small.named_parameters())
    return {sizes["f1.weight"].shape[1], sizes["f2.weight"].shape[0], sizes["e.weight"].shape[1]}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_an_excluded_layer_reads_keeps_its_channels(norm: bool, tied: bool) -> None:
    """No mask cuts the path between the two, so that nothing would be gained by masks around it."""
    torch.manual_seed(0)
    pruned = _pruned(Stream(norm=norm, tied=tied), "f1")
    masks = fxprune.masks(pruned)
    assert "f1.weight" not in masks
    assert "e.weight" not in masks or bool(masks["e.weight"].any(0).all())
    assert bool(masks["f2.weight"].any(1).all())
    assert _widths(pruned) == {16}


@pytest.mark.parametrize(("tied", "name"), [(False, "e"), (True, "e"), (True, "out")])
def test_an_excluded_embedding_keeps_its_channels(tied: bool, name: str) -> None:
    torch.manual_seed(0)
    pruned = _pruned(Stream(tied=tied), name)
    masks = fxprune.masks(pruned)
    assert "e.weight" not in masks
    assert bool(masks["f2.weight"].any(1).all())
    assert not bool(masks["f1.weight"].any(1).all())
    assert _widths(pruned) == {16}
    groups = fxprune.channel_groups(Stream(tied=tied), TOKENS, exclude=name)
    free = [one for one in groups if one.reason == ""]
    assert not any(part.parameter == "e.weight" for one in free for part in one.members)


def test_a_pruner_goes_on_with_the_width_of_the_embedding() -> None:
    """Nothing is excluded in the smaller network that was not in the one before."""
    torch.manual_seed(0)
    pruner = fxprune.Pruner(Stream(), "gmp", 0.6, total=4, example_inputs=TOKENS, granularity="channel")
    pruner.step(2)
    pruner.compact()
    before = pruner.model.get_parameter("e.weight").shape[1]
    pruner.step(4)
    pruner.compact()
    assert pruner.model.get_parameter("e.weight").shape[1] < before < 16
