"""Penalties on channel groups, against sums over slices of the parameters written out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune

X = torch.ones(2, 3, 6, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(20, 2),
    )  # fmt: skip


def slices(model: Any) -> list[list[Tensor]]:
    """All that goes with each channel: 4 of the first two convolutions, 5 of the third."""
    first = [
        [
            model[0].weight[c], model[0].bias[c : c + 1],
            model[1].weight[c : c + 1], model[1].bias[c : c + 1],
            model[3].weight[c], model[4].weight[:, c],
        ]
        for c in range(4)
    ]  # fmt: skip
    last = [
        [model[4].weight[c], model[4].bias[c : c + 1], model[6].weight[:, 4 * c : 4 * c + 4]]
        for c in range(5)
    ]
    return first + last


def squares(model: Any) -> Tensor:
    return torch.stack([sum((part.square().sum() for part in own), torch.zeros(())) for own in slices(model)])


def make(kind: str, model: nn.Module, **options: Any) -> Any:
    return fxprune.regularizer(kind, model, example_inputs=X, strength=0.1, **options)


def test_group_lasso() -> None:
    model = net()
    found = make("group-lasso", model)
    numbers = torch.tensor([float(sum(part.numel() for part in own)) for own in slices(model)])
    assert torch.equal(found.sizes(), numbers)
    assert torch.allclose(found.penalty(), 0.1 * (numbers.sqrt() * squares(model).sqrt()).sum())


def test_group_norm_weighs_small_groups_more() -> None:
    model = net()
    found = make("group-norm", model, alpha=2.0)
    norms = squares(model).detach().sqrt()
    factors = torch.cat([2 ** (2 * (n.max() - n) / (n.max() - n.min())) for n in (norms[:4], norms[4:])])
    assert torch.allclose(found.factors.float(), factors)
    assert torch.allclose(found.penalty(), 0.1 * (factors * squares(model)).sum())
    with torch.no_grad():
        model[0].weight[0] *= 10  # type: ignore[operator]
    assert torch.allclose(found.factors.float(), factors)
    found.step()
    assert found.factors[0] == 1


def test_greg_grows_on_the_groups_that_were_smallest_at_first() -> None:
    model = net()
    found = make("greg", model, sparsity=0.5, every=2, ceiling=3)
    at_first = squares(model).detach()
    chosen = torch.zeros(9)
    chosen[at_first[:4].argsort()[:2]] = 1
    chosen[4 + at_first[4:].argsort()[:2]] = 1
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 9.0, 1.0, 9.0])[:, None, None, None])  # type: ignore[operator]
    for step, factor in enumerate((1, 1, 2, 2, 3, 3, 3, 3)):
        assert found.steps == step
        assert torch.allclose(found.penalty(), 0.1 * factor / 2 * (chosen * squares(model)).sum())
        found.step()


@pytest.mark.parametrize("kind", ["group-lasso", "group-norm", "greg"])
def test_gradients_are_those_of_the_penalty(kind: str) -> None:
    model = net()
    found = make(kind, model)
    model(X).square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    own = dict(zip(before, torch.autograd.grad(found.penalty(), list(model.parameters()), allow_unused=True)))  # noqa: B905
    found.add_gradients()
    for name, parameter in model.named_parameters():
        expected = before[name] if own[name] is None else before[name] + own[name]
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected)


def test_groups_of_zeros_and_masked_models() -> None:
    model = net()
    pruned = fxprune.apply(model, "magnitude", 0.4, granularity="channel", example_inputs=X, progress=False)
    found = fxprune.regularizer("group-lasso", pruned, strength=0.1)
    found.penalty().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pruned.parameters())


def test_training_with_it_makes_groups_small() -> None:
    model = net()
    found = make("greg", model, sparsity=0.5, every=1)
    small = found.factors > 0
    before = found.squares().detach()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(30):
        optimiser.zero_grad()
        (model(torch.randn(8, 3, 6, 6)).square().mean() + found.penalty()).backward()
        optimiser.step()
        found.step()
    after = found.squares().detach()
    assert (after[small] < 0.3 * before[small]).all()
    assert (after[~small] > 0.3 * before[~small]).all()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"kind": "lasso"}, ValueError, "kind='lasso': expected one of 'group-lasso'"),
        ({"kind": nn.Linear(3, 2)}, ValueError, "kind: got a Linear: expected one of"),
        ({"strength": 0}, ValueError, "strength=0: expected a number above zero"),
        (
            {"alpha": 1.0},
            TypeError,
            "'greg' has no option 'alpha'; expected sparsity, every, ceiling, example_inputs, strength",
        ),
        (
            {"example_input": X},
            TypeError,
            r"'greg' has no option 'example_input'; did you mean 'example_inputs'\?$",
        ),
        ({"every": 0}, ValueError, "every=0"),
        ({"exclude": "nothing"}, ValueError, "exclude: 'nothing' fits nothing"),
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module"),
        (
            {"model": nn.Linear(3, 2), "example_inputs": torch.ones(1, 3)},
            ValueError,
            "no channel of it can go",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        fxprune.regularizer(**{"kind": "greg", "model": net(), "example_inputs": X, **options})
