"""Layer collapse through the front door: it warns, raises, or is repaired with the same number of weights."""

import warnings
from typing import Any

import pytest
import torch
from nets import NETS
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.methods import Problem
from fxprune.sparsity.budget import count

CLASSIFIER = "6.weight"


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def starve(problem: Problem) -> dict[str, torch.Tensor]:
    """Keeps the first weights there are, so that the last layers get none."""
    left, masks = problem.budget.total, {}
    for name, mask in problem.masks.items():
        number = min(left, mask.numel())
        masks[name] = (torch.arange(mask.numel()) < number).view(mask.shape)
        left -= number
    return masks


STARVE = fxprune.Method("starve", starve)
X = torch.ones(2, 3, 8, 8)


def test_it_warns_and_names_the_layers_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match=r"no path is left at all: 0\.weight, 2\.weight, 6\.weight") as noted:
        fxprune.apply(conv_net(), STARVE, 0.5, example_inputs=X)
    assert noted[0].filename == __file__


def test_it_raises_if_asked_to() -> None:
    with pytest.raises(RuntimeError, match=r"layer collapse: method 'starve' at sparsity 0\.5"):
        fxprune.apply(conv_net(), STARVE, 0.5, example_inputs=X, on_collapse="raise")


def test_one_dead_branch_is_named_and_the_rest_is_not() -> None:
    torch.manual_seed(0)
    model, inputs = NETS["residual"]()
    names = list(fxprune.masks(fxprune.apply(model, "random", 0.0, example_inputs=inputs)))

    def cut(problem: Problem) -> dict[str, torch.Tensor]:
        masks = {name: mask.clone() for name, mask in problem.masks.items()}
        masks[names[1]].zero_()
        return masks

    size = {name: p.numel() for name, p in model.named_parameters() if name in names}
    sparsity = size[names[1]] / sum(size.values())
    with pytest.warns(UserWarning, match=rf"no path is left through: {names[1]};"):
        pruned = fxprune.apply(model, fxprune.Method("cut", cut), sparsity, example_inputs=inputs)
    assert fxprune.analyze(pruned).dead_layers == (names[1],)


def test_layers_that_no_input_reaches_are_no_collapse() -> None:
    class Idle(nn.Module):
        """Its second layer's result is multiplied by a constant zero."""

        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(torch.ones(1, 4))
            return self.used(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = fxprune.apply(Idle(), "magnitude", 0.5, example_inputs=torch.ones(2, 4))
    assert fxprune.analyze(pruned).dead_layers == ()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("net", ["conv_chain", "residual", "projection", "dense", "shuffle", "excite_sigmoid",
                                 "multihead", "vit", "mixer", "dead_taps", "transposed"])  # fmt: skip
def test_repair_brings_every_layer_back_with_as_many_weights(net: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = fxprune.apply(model, STARVE, 0.8, example_inputs=inputs, on_collapse="repair")
    report = fxprune.analyze(pruned)
    assert report.dead_layers == ()
    assert report.effective_params > 0
    assert report.kept_params == count(report.params, 1 - 0.8)
    fxprune.verify(pruned)


@pytest.mark.parametrize("options", [{"budget": "uniform"}, {"granularity": "kernel"}, {"exclude": "2"}])
def test_repair_keeps_to_budget_granularity_and_exclusions(options: dict[str, Any]) -> None:
    def first(problem: Problem) -> dict[str, torch.Tensor]:
        """A corner of every layer; the corners do not meet."""
        budget, masks = problem.budget, {}
        for index, (name, mask) in enumerate(problem.masks.items()):
            number = budget.layers[name] if budget.layers else mask.numel() // 9 // 5 * 9
            chosen = (torch.arange(mask.numel()) < number).view(mask.shape)
            masks[name] = chosen.flip(0, 1) if index % 2 else chosen
        return masks

    method = fxprune.Method("corners", first) if "exclude" not in options else STARVE
    pruned = fxprune.apply(conv_net(), method, 0.8, example_inputs=X, on_collapse="repair", **options)
    report = fxprune.analyze(pruned)
    assert report.dead_layers == ()
    if options.get("budget") == "uniform":
        assert all(abs(layer.kept_params - 0.2 * layer.params) <= 1 for layer in report.layers.values())
    if "granularity" in options:
        kernels = fxprune.masks(pruned)["0.weight"].sum((2, 3))
        assert set(kernels.unique().tolist()) <= {0, 9}
        assert report.kept_params <= int(report.params * 0.2 + 0.5)
    if "exclude" in options:
        assert "2.weight" not in fxprune.masks(pruned)


@pytest.mark.slow
def test_repair_of_a_branch_takes_a_weight_for_each_of_its_layers() -> None:
    """All other weights stay what they were, if the rest can spare those that are added."""
    torch.manual_seed(0)
    x = torch.ones(1, 3, 32, 32)
    net = zoo.resnet20()
    before = fxprune.masks(fxprune.apply(net, "magnitude", 0.5, example_inputs=x))
    dead = [name for name in before if name.startswith(("blocks.1.", "blocks.8."))]

    def cut(problem: Problem) -> dict[str, torch.Tensor]:
        masks = {name: mask & (name not in dead) for name, mask in before.items()}
        for name in sorted(masks.keys() - dead):
            spare = problem.budget.total - sum(int(mask.sum()) for mask in masks.values())
            masks[name].view(-1)[(~masks[name]).flatten().nonzero().flatten()[:spare]] = True
        return masks

    cutting = fxprune.Method("cut", cut)
    with pytest.warns(UserWarning, match="no path is left through"):
        given = fxprune.masks(fxprune.apply(net, cutting, 0.5, example_inputs=x))
    repaired = fxprune.masks(fxprune.apply(net, cutting, 0.5, example_inputs=x, on_collapse="repair"))
    fresh = {name: int((repaired[name] & ~given[name]).sum()) for name in given}
    assert len(dead) == 4
    assert {name: number for name, number in fresh.items() if number} == dict.fromkeys(dead, 1)
    assert sum(int((given[name] & ~repaired[name]).sum()) for name in given) == 4


def test_repair_of_a_model_pruned_before_brings_nothing_back() -> None:
    first = fxprune.apply(conv_net(), "random", 0.3, example_inputs=X)
    second = fxprune.apply(first, "random", 0.98, on_collapse="repair")
    before, after = fxprune.masks(first), fxprune.masks(second)
    assert all(not bool((after[name] & ~before[name]).any()) for name in after)
    assert fxprune.analyze(second).dead_layers == ()


def test_repair_says_when_there_are_too_few_weights() -> None:
    with pytest.raises(RuntimeError, match=r"on_collapse='repair': .* 2 are to be kept"):
        fxprune.apply(conv_net(), STARVE, 1 - 2.2 / 824, example_inputs=X, on_collapse="repair")


def test_repair_is_deterministic_and_leaves_sound_masks_alone() -> None:
    once, again = (
        fxprune.masks(fxprune.apply(conv_net(), STARVE, 0.9, example_inputs=X, on_collapse="repair"))
        for _ in range(2)
    )
    assert all(torch.equal(mask, again[name]) for name, mask in once.items())
    plain = fxprune.masks(fxprune.apply(conv_net(), "synflow", 0.5, example_inputs=X, rounds=3))
    asked = fxprune.masks(
        fxprune.apply(conv_net(), "synflow", 0.5, example_inputs=X, rounds=3, on_collapse="repair")
    )
    assert all(torch.equal(mask, asked[name]) for name, mask in plain.items())


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))


def test_repair_takes_as_little_as_one_path() -> None:
    def first_layer_alone(problem: Problem) -> dict[str, torch.Tensor]:
        masks = {name: torch.zeros_like(mask) for name, mask in problem.masks.items()}
        masks["0.weight"][0] = True
        return masks

    method = fxprune.Method("first_layer_alone", first_layer_alone, scored=False)
    pruned = fxprune.apply(two_layers(), method, 0.75, example_inputs=torch.ones(1, 2), on_collapse="repair")
    assert [int(mask.sum()) for mask in fxprune.masks(pruned).values()] == [1, 1]
    assert fxprune.analyze(pruned).effective_params == 2


def test_repair_names_the_layer_that_has_too_few_weights() -> None:
    """Both halves of a product must live, which takes two weights of the layer that may keep one."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(y[..., :2] * y[..., 2:])

    budget = {"first": 11 / 12, "last": 0.0}
    with pytest.raises(RuntimeError, match=r"takes \d+ weights in 'first\.weight', 1 are to be kept there"):
        fxprune.apply(
            Product(), "magnitude", 0.5, budget=budget, example_inputs=torch.ones(2, 3), on_collapse="repair"
        )
