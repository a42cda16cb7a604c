"""NPB-SynFlow against its definition on the eager network: SynFlow, with random rounds early on."""

import pytest
import torch
from nets import NETS
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.paths.count import reach
from fxprune.sparsity.masks import Masks, dense, is_subset, total
from methods.problems import problem

EXAMPLE = torch.zeros(1, 3, 8, 8)


def chain(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    convs = [
        nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((3, width), (width, width), (width, width))
    ]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4, bias=False))


def asked(model: nn.Module, sparsity: float, **fields: object) -> Problem:
    return problem(model, sparsity, graph=lower(capture(model, EXAMPLE)), **fields)


def by_definition(model: nn.Module, question: Problem, rounds: int, every: int, until: int) -> Masks:
    """The eager loop: |w| m in the network itself, ones in; noise where the round number says so."""
    generator = torch.Generator().manual_seed(0)
    masks, net = dense(question.weights), lambda x: torch.func.functional_call(model.double(), weights, x)
    size, target = total(masks), question.budget.total
    for e in range(rounds):
        keep = target if e == rounds - 1 else int(size * (target / size) ** ((e + 1) / rounds) + 0.5)
        if e % every == 0 and e + 1 <= until and e < rounds - 1:
            scores = {
                n: torch.randn(w.shape, generator=generator).double() for n, w in question.weights.items()
            }
        else:
            weights = {n: (w.abs() * masks[n]).double().requires_grad_() for n, w in question.weights.items()}
            out = net(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum()
            found = torch.autograd.grad(out, list(weights.values()))
            scores = {
                n: (w * g).detach().where(masks[n], -1.0)
                for (n, w), g in zip(weights.items(), found, strict=True)
            }
        flat = torch.cat([score.flatten() for score in scores.values()])
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
        parts = chosen.split([w.numel() for w in question.weights.values()])
        masks = {n: p.view(w.shape) for (n, w), p in zip(question.weights.items(), parts, strict=True)}
    return masks


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize(("every", "until"), [(2, 5), (1, 3), (3, 99)])
def test_masks_equal_those_of_the_eager_loop(sparsity: float, every: int, until: int) -> None:
    model = chain()
    question = asked(model, sparsity)
    method = methods.get("npb-synflow", rounds=8, refresh_every=every, refresh_until=until)
    masks = method.find(question)
    expected = by_definition(model, question, 8, every, until)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("net", ["projection", "excite_sigmoid", "vit"])
def test_without_random_rounds_it_is_synflow(net: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    gm = capture(model, inputs)
    graph = lower(gm)
    only = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    masks = [
        methods.get(name, rounds=10, **options).find(problem(gm, 0.8, graph=graph, only=only))
        for name, options in (("npb-synflow", {"refresh_until": 0}), ("synflow", {}))
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in only)


@pytest.mark.slow
def test_random_rounds_keep_more_channels_in_use() -> None:
    used = {}
    for until in (0, 30):
        question = asked(chain(32), 0.99)
        masks = methods.get("npb-synflow", refresh_until=until, resolution="channel").find(question)
        effective = reach(question.graph, masks)
        used[until] = sum(int(mask.flatten(1).any(1).sum()) for mask in effective.values())
        assert total(masks) == question.budget.total
    assert used[30] > 1.2 * used[0]


def test_what_was_pruned_before_stays_pruned_and_the_end_is_never_random() -> None:
    model = chain()
    start = {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) < 0.7
             for n, w in asked(model, 0.5).weights.items()}  # fmt: skip
    question = asked(model, 0.8, masks=start, schedule="linear(4)")
    masks = methods.get("npb-synflow", refresh_every=1, refresh_until=99).find(question)
    assert is_subset(masks, start)
    assert total(masks) == question.budget.total
    assert all(bool(mask.any()) for mask in masks.values())


@pytest.mark.parametrize(("option", "value"), [("refresh_every", 0), ("refresh_until", -1)])
def test_bad_options(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}, expected an integer of at least"):
        methods.get("npb-synflow", **{option: value})
