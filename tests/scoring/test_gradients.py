"""Random, magnitude and SNIP: hand-computed cases and invariants."""

from typing import Any

import pytest
import torch
from methods.problems import TOY_A_DATA, half_square, problem, toy_a
from torch import nn

from fxprune import methods
from fxprune.scoring.data import batches as some_batches
from fxprune.scoring.gradients import masked, mean_gradients, scoring
from fxprune.sparsity.masks import Masks, dense, is_subset, total
from fxprune.sparsity.schedule import Exponential

IMAGES = torch.Generator().manual_seed(5)
X = torch.randn(6, 3, 8, 8, generator=IMAGES)
Y = torch.randint(0, 4, (6,), generator=IMAGES)


class ConvNet(nn.Module):
    """Convolution, BatchNorm, dropout and a branch that the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.unused = nn.Linear(6, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        self.unused(x)
        return self.fc(self.drop(x))


def conv_net() -> ConvNet:
    torch.manual_seed(1)
    return ConvNet()


def find(name: str, asked: methods.Problem, **options: Any) -> Masks:
    return methods.get(name, **options).find(asked)


def same(left: Masks, right: Masks) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_magnitude_of_toy_a() -> None:
    # |W1| = [[1, 1], [2, 1]], |W2| = [[1, 2]]: two of six are the twos.
    masks = find("magnitude", problem(toy_a(), 4 / 6))
    assert [mask.tolist() for mask in masks.values()] == [[[False, False], [True, False]], [[False, True]]]


def test_random_follows_the_seed_and_is_spread_evenly() -> None:
    net = nn.Linear(300, 100)
    first, again, other = (find("random", problem(net, 0.5, seed=seed)) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert total(first) == 15000
    # 3000 draws of 10 columns each at density 1/2: standard deviation 27.
    assert all(abs(int(part.sum()) - 1500) < 140 for part in first["weight"].split(30, dim=1))


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        # SNIP |w g| = [[18, 9], [72, 18]], [[9, 90]]: the order is 90, 72, 18, 18, 9, 9, ties by index.
        (1, [[[False, False], [False, False]], [[False, True]]]),
        (2, [[[False, False], [True, False]], [[False, True]]]),
        (3, [[[True, False], [True, False]], [[False, True]]]),
        (5, [[[True, True], [True, True]], [[False, True]]]),
    ],
)
def test_snip_of_toy_a(kept: int, expected: list[Any]) -> None:
    asked = problem(toy_a(), 1 - kept / 6, data=TOY_A_DATA, loss_fn=half_square)
    assert [mask.tolist() for mask in find("snip", asked).values()] == expected


def test_gradients_of_toy_a() -> None:
    # z = (1, 5), f = -9, L = 40.5; dL/dW1 = [[-18, -9], [36, 18]], dL/dW2 = [[-9, -45]].
    asked = problem(toy_a(), data=[TOY_A_DATA], loss_fn=half_square)
    some = some_batches(asked, 1, "test")
    with scoring(asked, "eval"):
        found = mean_gradients(asked, masked(asked, asked.masks), some, "test")
    assert [g.tolist() for g in found.values()] == [[[-18, -9], [36, 18]], [[-9, -45]]]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("average", ["gradient", "saliency"])
def test_snip_equals_a_plain_backward_pass(mode: str, average: str) -> None:
    net = conv_net()
    net.drop.p = 0.0
    batches = [(X[:2], Y[:2]), (X[2:4], Y[2:4]), (X[4:], Y[4:])]
    asked = problem(net, 0.6, data=batches)
    masks = find("snip", asked, batches=3, mode=mode, average=average)
    net.train(mode == "train")
    parameters = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    passes = []
    for x, y in batches:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        passes.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
        )
    signed = average == "gradient"
    scores = {
        name: (sum((p[name] * w if signed else (p[name] * w).abs()) for p in passes)).abs().detach()
        for name, w in parameters.items()
    }
    order = torch.cat([score.flatten() for score in scores.values()]).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[: asked.budget.total]] = True
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), kept)
    assert not masks["unused.weight"].any()


def test_snip_ignores_a_positive_factor_of_the_loss() -> None:
    def scaled(factor: float) -> Masks:
        def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return factor * nn.functional.cross_entropy(output, target)

        return find("snip", problem(conv_net(), 0.8, data=(X, Y), loss_fn=loss_fn))

    assert same(scaled(1.0), scaled(64.0))
    assert same(scaled(1.0), find("snip", problem(conv_net(), 0.8, data=(X, Y))))


def test_train_and_eval_are_different_methods() -> None:
    train, evaluated = (
        find("snip", problem(conv_net(), 0.8, data=(X, Y)), mode=mode) for mode in ("train", "eval")
    )
    assert not same(train, evaluated)


def test_snip_in_rounds_scores_the_pruned_network() -> None:
    # TOY-F: W1 = [[-1, 1], [1, 1]], W2 = [[-1, -2]], x = (2, 3). Dense |w g| = 22 33 44 66 | 11 110: the
    # first round takes W2[0, 0]. Then 0 0 40 60 | - 100: row 0 of W1 leads nowhere, its first tie stays.
    net = toy_a()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))
        net[2].weight.copy_(torch.tensor([[-1.0, -2.0]]))
    data = (torch.tensor([[2.0, 3.0]]), torch.tensor([[0.0]]))

    def two_rounds(t: int, rounds: int, target: float) -> float:
        return 5 / 6 if t == 1 else target

    asked = problem(net, 2 / 6, data=data, loss_fn=half_square, schedule=two_rounds)
    masks = find("snip", asked)
    assert [mask.tolist() for mask in masks.values()] == [[[True, False], [True, True]], [[False, True]]]


def test_pruning_again_stays_within_the_masks() -> None:
    net = conv_net()
    shapes = problem(net).weights
    start = {
        name: torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) < 0.5
        for name, w in shapes.items()
    }
    for name, data in (("random", None), ("magnitude", None), ("snip", (X, Y))):
        asked = problem(net, 0.8, masks=start, data=data)
        masks = find(name, asked)
        assert is_subset(masks, start)
        assert total(masks) == asked.budget.total


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_leaves_no_trace(mode: str) -> None:
    net = conv_net()
    net.norm.eval()
    net.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    asked = problem(net, 0.5, data=torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 2, shuffle=True))
    modes = [module.training for module in asked.model.modules()]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    with torch.no_grad():
        find("snip", asked, batches=2, mode=mode)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in asked.model.modules()] == modes
    assert not net.norm.training
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    assert all(p.grad is None for p in net.parameters())


def test_modes_come_back_after_an_error() -> None:
    def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    net = conv_net().eval()
    asked = problem(net, 0.5, data=(X, Y), loss_fn=broken)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        find("snip", asked)
    assert not any(module.training for module in asked.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_snip_follows_the_seed_alone() -> None:
    # Dropout and the shuffling loader are random; the state of the global generator must not matter.
    def masks(seed: int, state: int) -> Masks:
        torch.manual_seed(state)
        loader = torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 3, shuffle=True)
        return find("snip", problem(conv_net_fixed, 0.7, data=loader, seed=seed))

    conv_net_fixed = conv_net()
    assert same(masks(0, 1), masks(0, 2))
    assert not same(masks(0, 1), masks(1, 1))


def test_effective_weights_are_the_masked_ones() -> None:
    asked = problem(conv_net())
    none = {name: torch.zeros_like(mask) for name, mask in asked.masks.items()}
    assert all(not weight.any() and weight.requires_grad for weight in masked(asked, none).values())
    full = masked(asked, dense(asked.weights))
    assert all(torch.equal(full[name].detach(), weight) for name, weight in asked.weights.items())


def test_tied_and_shared_layers_get_the_sum_of_their_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            self.other = nn.Linear(2, 2, bias=False)
            self.other.weight = self.layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.layer(x))

    torch.manual_seed(0)
    net = Twice()
    asked = problem(net, 0.5, data=(torch.ones(1, 2), torch.zeros(1, 2)), loss_fn=half_square)
    assert list(asked.weights) == ["layer.weight"]
    half_square(net(torch.ones(1, 2)), torch.zeros(1, 2)).backward()
    assert net.layer.weight.grad is not None
    scores = (net.layer.weight * net.layer.weight.grad).abs().detach()
    masks = find("snip", asked)
    assert torch.equal(masks["layer.weight"].flatten(), scores.flatten() >= scores.flatten().sort().values[2])


def test_iterated_snip_is_nested() -> None:
    first = find("snip", problem(conv_net(), 0.5, data=(X, Y), schedule=Exponential(5)), mode="eval")
    assert total(first) == problem(conv_net(), 0.5).budget.total
