"""Channels that go while a network trains, to a target in multiply-adds, parameters or memory."""

from typing import Any

import pytest
import torch
from torch import nn

import fxprune

X = torch.ones(2, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(), nn.Conv2d(24, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def train(pruner: fxprune.Pruner, steps: int) -> list[float]:
    """Train, and return the multiply-adds that are left after every step."""
    optimiser = torch.optim.SGD(pruner.model.parameters(), 0.05)
    left = []
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        pruner.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimiser.step()
        pruner.step(step)
        table = fxprune.compact(pruner.model, X).meta["fxprune"]["compaction"]
        left.append(table.macs[1] / table.macs[0])
    return left


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["gmp", "imp"])
def test_a_target_in_multiply_adds_is_met_in_steps(method: str) -> None:
    pruner = fxprune.Pruner(
        net(), method, total=4, target=0.5, granularity="channel", of="macs", example_inputs=X
    )
    left = train(pruner, 4)
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.6
    assert 0.4 < left[-1] <= 0.5
    # The steps are those of the method: imp takes the same part of what is left each time.
    if method == "imp":
        assert all(0.5 ** (n / 4) - 0.1 < share <= 0.5 ** (n / 4) for n, share in enumerate(left, 1))


def test_the_end_is_what_apply_prunes_at_once() -> None:
    model = net()
    pruner = fxprune.Pruner(
        model, "gmp", 0.5, total=1, granularity="channel", of="memory", scope="layer", example_inputs=X
    )
    pruner.step(1)
    applied = fxprune.apply(
        model, "magnitude", 0.5, granularity="channel", of="memory", scope="layer", example_inputs=X,
        progress=False,
    )  # fmt: skip
    masks = fxprune.masks(applied)
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())


def test_a_second_time_saves_what_is_left_to_save() -> None:
    # Few weights are left where there are few positions; most multiply-adds are elsewhere.
    model = net()
    few: Any = fxprune.apply(
        model, "magnitude", 0.6, granularity="channel", exclude=("0",), example_inputs=X, returns="module"
    )
    dense = fxprune.compact(few, X).meta["fxprune"]["compaction"]
    assert dense.macs[1] / dense.macs[0] < 0.75
    again = fxprune.apply(few, "synflow", 0.3, granularity="channel", of="macs", rounds=4, example_inputs=X)
    table = fxprune.compact(again).meta["fxprune"]["compaction"]
    assert 0.6 < table.macs[1] / table.macs[0] <= 0.7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "target": 0.5}, r"sparsity=0\.5 and target=0\.5: two names of one number"),
        ({"target": 0.5, "granularity": "weight"}, "of='macs': granularity 'weight' has none"),
        ({"target": 0.5, "of": "joules"}, "of='joules': expected one of"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    given = {"total": 2, "granularity": "channel", "of": "macs", "example_inputs": X, **options}
    with pytest.raises(ValueError, match=words):
        fxprune.Pruner(net(), "gmp", **given)


@pytest.mark.parametrize(("of", "limit"), [("macs", 40_000), ("params", 2500), ("weights", 2000.0)])
def test_a_limit_in_units_of_the_cost(of: str, limit: float) -> None:
    model = net()
    pruner = fxprune.Pruner(
        model, "gmp", total=2, granularity="channel", of=of, at_most=limit, example_inputs=X
    )
    for step in (1, 2):
        pruner.step(step)
    small = fxprune.compact(pruner.model, X)
    left = {
        "macs": small.meta["fxprune"]["compaction"].macs[1],
        "params": sum(parameter.numel() for parameter in small.parameters()),
        "weights": sum(int(mask.sum()) for mask in pruner.masks.values()),
    }
    assert 0.8 * limit < left[of] <= limit


def test_limits_that_do_not_fit_are_refused() -> None:
    given = {"total": 2, "granularity": "channel", "of": "macs", "example_inputs": X}
    with pytest.raises(ValueError, match=r"at_most: it says what may stay, and target=0\.5 too; give one"):
        fxprune.Pruner(net(), "gmp", target=0.5, at_most=1e4, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at_most=1000000000\.0: the network takes \d+ MACs as it is"):
        fxprune.Pruner(net(), "gmp", at_most=1e9, **given)  # type: ignore[arg-type]


def test_a_target_out_of_reach_is_refused_before_any_training() -> None:
    # The smallest network keeps one channel of each layer, and all outputs.
    least = 27 * 64 + 9 * 9 + 9 + 4
    whole = 27 * 16 * 64 + 9 * 16 * 24 * 9 + 24 * 16 * 9 + 16 * 4
    lowest = 1 - least / whole
    with pytest.raises(ValueError, match=rf"must stay.*a sparsity of at most {int(1e4 * lowest) / 1e4}"):
        fxprune.Pruner(
            net(), "gmp", total=4, target=lowest + 1e-3, granularity="channel", of="macs", example_inputs=X
        )
    pruner = fxprune.Pruner(
        net(), "gmp", total=1, target=lowest - 1e-3, granularity="channel", of="macs", example_inputs=X
    )
    pruner.step(1)


class TwoTables(nn.Module):
    """Two tables beside each other, the longer one with the larger entries of the layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.long, self.short = nn.Embedding(90, 4), nn.Embedding(5, 4)
        self.wide, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.wide.weight[:, :4] *= 10

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(torch.cat([self.long(one), self.short(other)], -1)).relu())


def test_a_target_that_other_scores_than_those_of_the_first_weights_reach_is_not_refused() -> None:
    model, index = TwoTables(), torch.zeros(3, dtype=torch.int64)
    given = {"granularity": "channel", "of": "params", "example_inputs": (index, index)}
    # One channel of the short table, one hidden one: 5 + 2 + 6; of the long one it is 90 + 2 + 6.
    target = 1 - 40 / sum(parameter.numel() for parameter in model.parameters())
    pruner = fxprune.Pruner(model, "gmp", target, total=1, **given)  # type: ignore[arg-type]
    with torch.no_grad():
        pruner.model.get_parameter("wide.weight")[:, 4:] *= 1000
    pruner.step(1)
    assert sum(parameter.numel() for parameter in fxprune.compact(pruner.model).parameters()) <= 40
    with pytest.raises(ValueError, match="must stay"):
        fxprune.Pruner(model, "gmp", 1 - (1 - target) / 4, total=1, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": 50}, r"^target=50: expected a fraction in \(0, 1\); 50 percent is 0\.5$"),
        ({"target": "half"}, r"^target='half': expected a fraction"),
        ({"target": 0.5, "initial": 0.7}, r"from 0 to target=0\.5$"),
        ({"sparsity": 50}, r"^sparsity=50: expected a fraction"),
    ],
)
def test_a_wrong_target_is_named_as_it_was_given(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fxprune.Pruner(net(), "gmp", total=4, example_inputs=X, **given)
