"""The cost of compaction: few runs, little memory, and nothing that the two networks share afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peak import Peak
from torch import Tensor, fx, nn

import fxprune

WIDTH = 256


def chain(layers: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*parts[:-1]).eval(), torch.randn(2, WIDTH)


def halved(layers: int) -> tuple[fx.GraphModule, Tensor]:
    net, x = chain(layers)
    return fxprune.apply(net, "magnitude", 0.6, example_inputs=x, granularity="channel", progress=False), x


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@pytest.mark.parametrize("kind", ["masked", "zeros", "nothing"])
def test_the_networks_share_no_memory(kind: str) -> None:
    pruned, x = halved(4)
    given: nn.Module = {"masked": pruned, "zeros": fxprune.finalize(pruned), "nothing": chain(4)[0]}[kind]
    small = fxprune.compact(given, x)
    assert not storages(given) & storages(small)
    before = given(x)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    assert torch.equal(given(x), before)


@pytest.mark.slow
def test_memory_is_that_of_what_stays_and_little_more() -> None:
    """Sixteen layers of 256 KiB, of which 40 % stay: masks, what stays, and one layer at a time."""
    pruned, _ = halved(16)
    weights = 16 * WIDTH * WIDTH * 4
    with Peak() as peak:
        fxprune.compact(pruned)
    assert peak.peak < 0.9 * weights


def test_both_networks_run_twice(monkeypatch: Any) -> None:
    """Once for each of the two inputs: what is recorded, shown and verified comes from the same runs."""
    runs: list[tuple[fx.GraphModule, int]] = []
    own = fx.Interpreter.run

    def run(self: fx.Interpreter, *args: Any, **kwargs: Any) -> Any:
        runs.append((self.module, len(args)))
        return own(self, *args, **kwargs)

    pruned, _ = halved(3)
    monkeypatch.setattr(fx.Interpreter, "run", run)
    small = fxprune.compact(pruned)
    assert len(runs) == 4
    assert sum(module is small for module, _ in runs) == 2


def test_a_bias_of_two_layers_takes_up_the_constants_of_both() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    net[4].bias = net[2].bias
    x = torch.randn(3, 4)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:2] = 0.0
            layer.bias.fill_(0.7)
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
