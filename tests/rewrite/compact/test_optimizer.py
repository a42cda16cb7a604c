"""An optimizer goes on in the compact network as it would have in the masked one."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxprune


def masked() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    # A bias in front of a batch norm has no derivative but rounding, of which Adam makes steps of full size.
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    model = nn.Sequential(*layers)
    x = torch.randn(6, 3, 5, 5)
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    return pruned.train(), x


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})],
)
def test_steps_after_compaction_are_those_of_the_masked_network(kind: Any, options: dict[str, Any]) -> None:
    pruned, x = masked()
    optimizer = kind(pruned.parameters(), **options)

    def step(model: nn.Module, own: torch.optim.Optimizer) -> None:
        own.zero_grad()
        model(x).square().mean().backward()
        own.step()

    for _ in range(3):
        step(pruned, optimizer)
    small = fxprune.compact(pruned)
    smaller = fxprune.remap_optimizer(optimizer, pruned, small)
    assert type(smaller) is kind
    assert smaller.param_groups[0]["lr"] == options["lr"]
    for _ in range(3):
        step(pruned, optimizer)
        step(small, smaller)
    assert torch.allclose(pruned.eval()(x), small.eval()(x), atol=1e-5)


@pytest.mark.parametrize("older", [False, True])
def test_weights_that_were_computed_join_the_group_of_what_they_were_computed_from(older: bool) -> None:
    torch.manual_seed(0)
    norm = nn.utils.weight_norm if older else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older form
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    pruned = fxprune.apply(net, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(
        (pruned.get_submodule("0"), pruned.get_submodule("2"), pruned.get_submodule("4")), (0.1, 0.2, 0.3),
        strict=True)]  # fmt: skip
    small = fxprune.compact(pruned)
    made = fxprune.remap_optimizer(torch.optim.SGD(groups), pruned, small)
    names = {id(parameter): name for name, parameter in small.named_parameters()}
    found = {group["lr"]: {names[id(p)] for p in group["params"]} for group in made.param_groups}
    assert found == {rate: {f"{i}.weight", f"{i}.bias"} for rate, i in ((0.1, 0), (0.2, 2), (0.3, 4))}


@pytest.mark.parametrize("lengths", [False, True])
def test_weights_that_were_computed_decay_as_their_directions(lengths: bool) -> None:
    """Lengths stand in a group without decay, or are not trained at all."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    net, x = nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)
    pruned = fxprune.apply(net, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    parts = dict(pruned.named_parameters())
    first = parts.pop("0.parametrizations.weight.original0")
    groups = [{"params": [first], "weight_decay": 0.0}] if lengths else []
    optimizer = torch.optim.SGD([*groups, {"params": list(parts.values()), "weight_decay": 0.1}], 0.1)
    small = fxprune.compact(pruned)
    made = fxprune.remap_optimizer(optimizer, pruned, small)
    weight = small.get_parameter("0.weight")
    assert [g["weight_decay"] for g in made.param_groups for p in g["params"] if p is weight] == [0.1]


def test_bad_input() -> None:
    pruned, _ = masked()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"after: expected what fxprune.compact returned"):
        fxprune.remap_optimizer(optimizer, pruned, pruned)
    with pytest.raises(TypeError, match=r"^before: expected a torch\.nn\.Module, got a NoneType"):
        fxprune.remap_optimizer(optimizer, None, fxprune.compact(pruned))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"before: it lacks a parameter of the optimizer's group 0"):
        fxprune.remap_optimizer(optimizer, nn.Linear(2, 2), fxprune.compact(pruned))
