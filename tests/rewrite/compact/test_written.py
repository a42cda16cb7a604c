"""Networks that write into their own parameters are compacted on a copy, and keep the shapes of those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.rewrite.compact.written import written_parameters


class Bounded(nn.Module):
    """Vectors of a table are shortened in place as they are read."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.e, self.functional = nn.Embedding(9, 6, max_norm=0.5), functional
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = F.embedding(i, self.e.weight, max_norm=0.5) if self.functional else self.e(i)
        out: torch.Tensor = self.b(self.a(x).relu())
        return out


class Causal(nn.Module):
    """A weight is multiplied by a mask of the network's own, in place, as in PixelCNN."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("causal", torch.ones(6, 6).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.c.weight.data *= self.causal
        out: torch.Tensor = self.b(self.a(self.c(x)).relu())
        return out


NETS: dict[str, tuple[Any, torch.Tensor, str]] = {
    "module": (lambda: Bounded(False), torch.tensor([[0, 3, 8]]), "e.weight"),
    "function": (lambda: Bounded(True), torch.tensor([[0, 3, 8]]), "e.weight"),
    "mask": (Causal, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), "c.weight"),
}


@pytest.mark.parametrize("kind", NETS)
def test_the_users_model_is_as_it_was_and_the_rest_gets_smaller(kind: str) -> None:
    build, x, written = NETS[kind]
    torch.manual_seed(0)
    net = build().eval()
    with torch.no_grad():
        for name in ("a.weight", "a.bias", "c.weight"):
            if name in dict(net.named_parameters()):
                net.get_parameter(name)[:3] = 0
    assert written_parameters(fxprune.capture(net, x)) == {written}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = fxprune.compact(net, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert small.get_parameter("a.weight").shape[0] == 5
    assert small.get_parameter(written).shape == before[written].shape
    assert torch.allclose(small(x), net(x), atol=1e-6)
