"""Linear attention with a state: channels of keys and of values go by themselves, equally many per head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune

HEADS, KEYS, VALUES = 2, 8, 6


class Attention(nn.Module):
    """Chunks of a sequence that read a state and add to it; ``kind`` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key = nn.Linear(16, HEADS * KEYS), nn.Linear(16, HEADS * KEYS)
        self.value, self.gate = nn.Linear(16, HEADS * VALUES), nn.Linear(16, HEADS)
        self.out = nn.Linear(HEADS * VALUES, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        if self.kind == "normed":
            key = key * torch.rsqrt((key * key).sum(-1, keepdim=True) + 1e-6)
        state = torch.zeros(x.shape[0], HEADS, key.shape[-1], value.shape[-1])
        found = []
        for start in range(0, 4, 2):
            q, k, v, g = (each[:, :, start : start + 2] for each in (query, key, value, gate))
            if self.kind == "solved":
                scores = ((k * g) @ k.transpose(-1, -2)).tril(-1)
                v = torch.linalg.solve_triangular(scores, v * g, upper=False, unitriangular=True)
            if self.kind in ("solved", "delta"):
                v = v - k @ state
            found.append(q @ state + (q @ k.transpose(-1, -2) * g).tril() @ v)
            state = state * 0.9 + k.transpose(-1, -2) @ v
        y: Tensor = self.out(torch.cat(found, 2).transpose(1, 2).flatten(2))
        return y


@pytest.mark.every_case
@pytest.mark.parametrize("kind", ["plain", "normed", "delta", "solved"])
def test_channels_of_keys_and_values_go_by_themselves(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Attention(kind).eval(), torch.randn(3, 4, 16)
    groups = [group for group in fxprune.channel_groups(net, x) if group.removable]
    sizes = {
        frozenset(member.parameter for member in group.members if member.axis == "out"): group.size
        for group in groups
    }
    assert sizes == {frozenset({"query.weight", "key.weight"}): 4, frozenset({"value.weight"}): 2}
    assert len(groups) == KEYS + VALUES
    for seed in range(3):
        pruned = fxprune.apply(
            net, "random", 0.3, granularity="channel", example_inputs=x, progress=False, seed=seed
        )
        for verify in (True, False):
            small = fxprune.compact(pruned, x, verify=verify)
            assert small.meta["fxprune"]["compaction"].given_back == 0
            assert small.get_parameter("key.weight").shape[0] < HEADS * KEYS
            with torch.no_grad():
                torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


def test_a_sum_of_squares_of_another_is_a_gate() -> None:
    """It scales no more than what was squared only if that is what it scales."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = nn.Linear(4, 6), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            y: Tensor = self.out(self.value(x) * (gate * gate).sum(-1, keepdim=True))
            return y

    x = torch.randn(3, 4)
    pruned = fxprune.apply(Gated().eval(), "synflow", 0.5, example_inputs=x, progress=False)
    assert fxprune.masks(pruned)["gate.weight"].any()
