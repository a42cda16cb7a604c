"""SparseGPT against optimal brain surgery with explicit inverse Hessians, one layer at a time."""

import copy
import warnings
from typing import Any

import pytest
import torch
from scoring.processes import together
from torch import Tensor, nn
from torch.nn.functional import unfold

import fxprune
from fxprune import methods
from fxprune.scoring.surgeon import surgery, upper_factor
from methods.experts import mixtral
from methods.problems import problem

DAMP = 0.01


def hessian(x: Tensor) -> Tensor:
    """X^T X with damping; ones for inputs that are always zero."""
    h = x.T @ x
    dead = h.diagonal() == 0
    return h + torch.diag(torch.where(dead, 1.0, DAMP * h.diagonal().mean()).to(h))


def dense_obs(weight: Tensor, x: Tensor, keep: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """Remove inputs' weights from left to right, with the inverse of the Hessian of all inputs from it on."""
    w, h = weight.clone(), hessian(x)
    mask = torch.ones_like(w, dtype=torch.bool)
    outputs, inputs = w.shape
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        scores = torch.empty(outputs, last - first, dtype=w.dtype)
        for j in range(first, last):
            scores[:, j - first] = w[:, j] ** 2 / h[j:, j:].inverse()[0, 0]
        share = keep * (last - first) // inputs
        best = scores.flatten().argsort(descending=True)[:share]
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[best] = True
        mask[:, first:last] = chosen.view_as(scores)
        for j in range(first, last):
            inverse = h[j:, j:].inverse()
            gone = ~mask[:, j]
            w[gone, j:] -= w[gone, j : j + 1] / inverse[0, 0] * inverse[0]
            w[gone, j] = 0
    return mask, w


def correlated(rows: int, inputs: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, inputs).double() @ torch.randn(inputs, inputs).double()


def solve(model: nn.Module, x: Tensor, sparsity: float = 0.5, **options: Any) -> tuple[Any, Any]:
    fields = {name: options.pop(name) for name in ("granularity", "group", "masks") if name in options}
    method = methods.get("sparsegpt", **{"damp": DAMP, **options})
    return method.find(problem(model.eval(), sparsity, data=(x, torch.zeros(len(x))), **fields))  # type: ignore[return-value]


@pytest.mark.parametrize("block", [4, 6, 12, 128])
def test_a_linear_layer(block: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).double(), correlated(40, 12)
    masks, weights = solve(model, x, block=block)
    mask, expected = dense_obs(model[0].weight.detach(), x, 30, block)
    assert torch.equal(masks["0.weight"], mask)
    assert torch.allclose(weights["0.weight"] * mask, expected)


@pytest.mark.parametrize("block", [1, 3, 8, 20, 21, 64])
def test_lazy_updates_are_the_updates(block: int) -> None:
    """With masks given, the size of blocks changes nothing."""
    x = correlated(50, 21)
    torch.manual_seed(2)
    start, keep = torch.randn(1, 21, 7).double(), torch.rand(1, 21, 7) < 0.4
    factor = upper_factor((x.T @ x)[None], DAMP)
    values = start.clone()
    surgery(values, factor, lambda first, last, _: keep[:, first:last], block)
    one_by_one, h = start[0].T.clone(), hessian(x)
    for j in range(21):
        inverse = h[j:, j:].inverse()
        one_by_one[:, j:] -= (
            torch.where(keep[0, j], 0.0, one_by_one[:, j] / inverse[0, 0])[:, None] * inverse[0]
        )
    assert torch.allclose(values[0].T, one_by_one * keep[0].T)


def test_a_convolution_is_a_linear_layer_on_its_windows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).double()
    x = torch.randn(9, 4, 8, 8).double()
    masks, weights = solve(model, x, 0.5)
    windows = unfold(x, 3, padding=1, stride=2).permute(0, 2, 1).reshape(-1, 2, 18)
    weight = model[0].weight.detach().flatten(1)
    # Both groups compete for one number of weights; each is solved with the masks that it got.
    for group, rows in enumerate((slice(0, 3), slice(3, 6))):
        keep = masks["0.weight"].flatten(1)[rows]
        mask, expected = given_mask(weight[rows], windows[:, group], keep)
        assert torch.allclose((weights["0.weight"] * masks["0.weight"]).flatten(1)[rows], expected * mask)
    assert int(masks["0.weight"].sum()) == 54


def given_mask(weight: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    w, h = weight.clone(), hessian(x)
    for j in range(w.shape[1]):
        inverse = h[j:, j:].inverse()
        gone = ~keep[:, j]
        w[gone, j:] -= w[gone, j : j + 1] / inverse[0, 0] * inverse[0]
    return keep, w * keep


def test_a_transposed_convolution_has_less_error_than_its_masks_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)).double()
    x = torch.randn(7, 6, 5, 5).double().cumsum(1)
    masks, weights = solve(model, x, 0.5)
    dense = model(x)
    weight, mask = model[0].weight.detach().clone(), masks["0.weight"]

    def error(values: Tensor) -> float:
        other = copy.deepcopy(model)
        other[0].weight.data = values * mask
        return float((other(x) - dense).detach().square().sum())

    assert error(weights["0.weight"]) < 0.7 * error(weight)
    # Nudging any kept weight of the last input makes it worse: no input comes after it.
    index = mask.nonzero()[-1]
    for step in (1e-3, -1e-3):
        nudged = weights["0.weight"].clone()
        nudged[tuple(index)] += step
        assert error(nudged) > error(weights["0.weight"]) - 1e-2


def test_two_of_four_is_chosen_when_its_four_are_reached() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 3)).double(), correlated(40, 8)
    masks, weights = solve(model, x, granularity=fxprune.sparsity.granularity.NM(2, 4))
    w, h = model[0].weight.detach().clone(), hessian(x)
    for first in (0, 4):
        scale = torch.stack([h[j:, j:].inverse()[0, 0] for j in range(first, first + 4)])
        top = (w[:, first : first + 4] ** 2 / scale).topk(2, 1).indices
        keep = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, top, True)
        assert torch.equal(masks["0.weight"][:, first : first + 4], keep)
        for j in range(first, first + 4):
            inverse = h[j:, j:].inverse()
            gone = ~keep[:, j - first]
            w[gone, j:] -= w[gone, j : j + 1] / inverse[0, 0] * inverse[0]
    assert torch.allclose(weights["0.weight"] * masks["0.weight"], w * masks["0.weight"])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("granularity", ["nm(2,4)", "kernel", "block(2,2)", "channel"])
def test_every_granularity_keeps_its_pattern_and_helps(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 12),
    ).eval()  # fmt: skip
    x = torch.rand(100, 4, 5, 5)

    def error(method: str, **options: Any) -> float:
        pruned = fxprune.apply(
            model, method, 0.5, example_inputs=x, data=(x, torch.zeros(100)), granularity=granularity,
            progress=False, **options,
        )  # fmt: skip
        fxprune.verify(pruned)
        return float((pruned(x) - model(x)).detach().square().mean())

    assert error("sparsegpt") < error("magnitude", budget="global" if granularity == "channel" else "uniform")


def test_attention_is_solved_by_the_inputs_of_each_projection() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    x = torch.randn(20, 5, 8).double() @ torch.randn(8, 8).double()
    pruned = fxprune.apply(
        layer, "sparsegpt", 0.5, example_inputs=x, data=(x, torch.zeros(20)), damp=DAMP, progress=False
    )
    mask, expected = dense_obs(layer.self_attn.in_proj_weight.detach(), x.flatten(0, 1), 96)
    assert torch.equal(fxprune.masks(pruned)["self_attn.in_proj_weight"], mask)
    assert torch.allclose(pruned.get_parameter("self_attn.in_proj_weight"), expected * mask)
    # Each projection is solved on what the one before it gives.
    tapped: dict[str, Tensor] = {}
    final = fxprune.finalize(pruned)
    for name in ("linear1", "linear2"):
        final.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: tapped.setdefault(name, args[0].detach())
        )
    final(x)
    for name in ("linear1", "linear2"):
        weight = layer.get_submodule(name).weight.detach()
        mask, expected = dense_obs(weight, tapped[name].flatten(0, 1), weight.numel() // 2)
        assert torch.allclose(final.get_submodule(name).weight, expected * mask)


@pytest.mark.parametrize("propagate", [True, False])
def test_the_second_layer_sees_what_the_first_gives(propagate: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double(), correlated(60, 6)
    masks, weights = solve(model, x, propagate=propagate)
    first = copy.deepcopy(model[0])
    if propagate:
        first.weight.data = weights["0.weight"] * masks["0.weight"]
    hidden = torch.relu(first(x)).detach()
    mask, expected = dense_obs(model[2].weight.detach(), hidden, 20)
    assert torch.equal(masks["2.weight"], mask)
    assert torch.allclose(weights["2.weight"] * mask, expected)


def test_micro_batches_and_several_batches_are_one_batch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double(), correlated(60, 6)
    whole = solve(model, x)
    labels = torch.zeros(20)
    data = [(part, labels) for part in x.split(20)]
    method = methods.get("sparsegpt", batches=3, damp=DAMP)
    parts = method.find(problem(model, 0.5, data=data, micro_batch=7))
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.allclose(one[name].double(), other[name].double()) for name in one)


def test_inputs_that_are_always_zero_lose_their_weights_first_and_change_nothing() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 6)).double(), correlated(50, 12)
    x[:, [2, 5, 6]] = 0
    masks, weights = solve(model, x, 0.5)
    assert not masks["0.weight"][:, [2, 5, 6]].any()
    live = [j for j in range(12) if j not in (2, 5, 6)]
    damp = DAMP * (x.T @ x).diagonal().mean()
    h = (x.T @ x)[live][:, live] + damp * torch.eye(9).double()
    w, keep = model[0].weight.detach()[:, live].clone(), masks["0.weight"][:, live]
    for j in range(9):
        inverse = h[j:, j:].inverse()
        gone = ~keep[:, j]
        w[gone, j:] -= w[gone, j : j + 1] / inverse[0, 0] * inverse[0]
    assert torch.allclose((weights["0.weight"] * masks["0.weight"])[:, live], w * keep)
    # Where the budget leaves some of them, they are as they were.
    masks, weights = solve(model, x, 0.125)
    stay = masks["0.weight"][:, [2, 5, 6]]
    assert stay.any()
    assert torch.equal(weights["0.weight"][:, [2, 5, 6]][stay], model[0].weight[:, [2, 5, 6]][stay])


def test_fewer_samples_than_inputs_are_enough_and_told_of() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 6)).double(), correlated(8, 30)
    with pytest.warns(UserWarning, match="'0.weight' has 8 for 30, so that its Hessian has rank 8 at most"):
        masks, weights = solve(model, x)
    mask, expected = dense_obs(model[0].weight.detach(), x, 90)
    assert torch.equal(masks["0.weight"], mask)
    assert torch.allclose(weights["0.weight"] * mask, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)
    x = (300 * torch.rand(400, 16)).to(dtype)  # squares are beyond float16
    masks, weights = solve(model, x)
    assert all(value.dtype == dtype and bool(torch.isfinite(value).all()) for value in weights.values())
    mask, expected = dense_obs(model[0].weight.detach().float(), x.float(), 96)
    assert (masks["0.weight"] == mask).float().mean() > 0.97
    close = torch.isclose((weights["0.weight"] * masks["0.weight"]).float(), expected, atol=0.02, rtol=0.05)
    assert close[masks["0.weight"] == mask].float().mean() > 0.95


def test_the_damping_falls_with_the_number_of_inputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).double(), correlated(400, 12)
    masks, weights = solve(model, x, damp=None)
    expected = solve(model, x, damp=0.5)  # 10 / sqrt(400)
    assert torch.equal(masks["0.weight"], expected[0]["0.weight"])
    assert torch.equal(weights["0.weight"], expected[1]["0.weight"])


def test_few_inputs_do_not_spoil_the_outputs_for_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 40)).double()
    every = torch.relu(torch.randn(3000, 20).double() @ torch.randn(20, 80).double()) + torch.rand(3000, 80)
    given, others = every[:60], every[60:]

    def error(damp: float | None) -> float:
        masks, weights = solve(model, given, damp=damp)
        change = weights["0.weight"] * masks["0.weight"] - model[0].weight
        return float((others @ change.T).detach().square().sum())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(None) < 0.9 * error(0.01)


def test_layers_share_a_budget_by_the_errors_of_their_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    model[0].weight.data[:, 3:] *= 0.05  # most of this layer may go at little cost
    x = correlated(60, 12)
    hidden = torch.tanh(model[0](x)).detach()
    relative = []
    for inputs, layer in ((x, model[0]), (hidden, model[2])):
        weight = layer.weight.detach()
        relative.append(weight**2 / hessian(inputs).inverse().diagonal() / (inputs @ weight.T).square().sum())
    threshold = torch.cat([one.flatten() for one in relative]).sort().values[100]
    masks, _ = solve(model, x, split="error")
    numbers = [int((one >= threshold).sum()) for one in relative]
    assert [int(mask.sum()) for mask in masks.values()] == numbers
    assert numbers[0] < 40
    equal, _ = solve(model, x)
    assert [int(mask.sum()) for mask in equal.values()] == [60, 40]


def test_what_was_pruned_stays_pruned() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).double(), correlated(40, 12)
    options: dict[str, Any] = {"example_inputs": x, "data": (x, torch.zeros(40)), "progress": False}
    once = fxprune.apply(model, "sparsegpt", 0.3, **options)
    twice = fxprune.apply(once, "sparsegpt", 0.6, **options)
    assert bool((fxprune.masks(once)["0.weight"] | ~fxprune.masks(twice)["0.weight"]).all())
    assert fxprune.analyze(twice).density == pytest.approx(0.4)


def test_a_round_starts_from_the_weights_of_the_one_before_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).double(), correlated(40, 12)
    options: dict[str, Any] = {"example_inputs": x, "data": (x, torch.zeros(40)), "progress": False}
    once = fxprune.apply(model, "sparsegpt", 0.3, **options)
    twice = fxprune.apply(once, "sparsegpt", 0.6, **options)
    # Densities of 0.7 and 0.4 are those of this schedule.
    rounds = fxprune.apply(model, "sparsegpt", 0.6, schedule="linear(2)", **options)
    assert torch.equal(fxprune.masks(rounds)["0.weight"], fxprune.masks(twice)["0.weight"])
    assert torch.allclose(rounds.get_parameter("0.weight"), twice.get_parameter("0.weight"))


def test_a_model_without_a_graph_is_solved_in_order() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.one(x))
            return self.two(y) if float(y.sum()) > 0 else y[:, :4]

    torch.manual_seed(0)
    model, x = Branching().double().eval(), correlated(60, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = fxprune.apply(
            model, "sparsegpt", 0.5, example_inputs=x, data=(x, torch.zeros(60)), returns="module",
            budget="uniform", damp=DAMP, progress=False,
        )  # fmt: skip
    plain = nn.Sequential(model.one, nn.ReLU(), model.two)
    masks, weights = solve(plain, x)
    assert torch.equal(fxprune.masks(pruned)["two.weight"], masks["2.weight"])
    assert torch.allclose(pruned.two.weight, weights["2.weight"] * masks["2.weight"])


def test_a_node_may_be_called_model() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.one(x)) if float(x.sum()) < 1e9 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = Inner(), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.model(x))

    torch.manual_seed(0)
    model, x = Outer().double().eval(), correlated(60, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = fxprune.capture(model, x)
    assert "model" in [node.name for node in captured.graph.nodes]
    masks, weights = solve(captured, x)
    expected = solve(nn.Sequential(model.model.one, nn.ReLU(), model.head), x)
    for name, other in (("model.one.weight", "0.weight"), ("head.weight", "2.weight")):
        assert torch.equal(masks[name], expected[0][other])
        assert torch.allclose(weights[name], expected[1][other])


def test_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(36, 4))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(40, 3, 5, 5)
    state = torch.get_rng_state()
    given = problem(model, 0.5, data=(x, torch.zeros(40)))
    methods.get("sparsegpt").find(given)
    assert all(torch.equal(before[name], value) for name, value in given.model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Experts(nn.Module):
    """Four experts in one parameter, of which the data never reaches the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        first = (x[:, :1] > 0).to(x)
        zero = torch.zeros_like(x)
        return torch.bmm(torch.stack([x * first, x * (1 - first), zero, zero]), self.up).sum(0)


def test_experts_have_moments_of_their_own_and_unused_ones_are_named() -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), correlated(60, 6)
    with pytest.warns(UserWarning, match=r"no inputs are seen of up\[2\], up\[3\]; they are pruned by magn"):
        masks, weights = solve(model, x)
    first = x[:, 0] > 0
    for expert, rows in ((0, first), (1, ~first)):
        keep = masks["up"][expert].T
        _, expected = given_mask(model.up[expert].T.detach(), x[rows], keep)
        assert torch.allclose((weights["up"][expert].T) * keep, expected)
    rest, keep = model.up[2:].detach().abs(), masks["up"][2:]
    assert int(keep.sum()) == 30
    assert rest[keep].min() >= rest[~keep].max()
    assert torch.equal(weights["up"][2:] * keep, model.up[2:] * keep)


@pytest.mark.slow
def test_experts_of_transformers_are_solved_by_the_tokens_they_get() -> None:
    model = mixtral()
    ids = torch.randint(50, (16, 8))
    taken: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: taken.extend(args[:2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    hidden, choice = taken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = fxprune.apply(
            model, "sparsegpt", 0.5, example_inputs={"input_ids": ids[:2]}, returns="module", progress=False,
            data=({"input_ids": ids}, torch.zeros(16)), propagate=False, damp=DAMP,
        )  # fmt: skip
    name = "model.layers.0.mlp.experts.gate_up_proj"
    mask, values = fxprune.masks(pruned)[name], pruned.get_parameter(name)
    for expert in range(3):
        rows = hidden[(choice == expert).any(-1)].double()
        if len(rows) > 8:
            _, expected = given_mask(experts.gate_up_proj[expert].detach().double(), rows, mask[expert])
            assert torch.allclose(values[expert].double(), expected, atol=1e-5)


def test_bad_input_is_told_of() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(8, 4)
    with pytest.raises(ValueError, match="method 'sparsegpt' needs data"):
        fxprune.apply(model, "sparsegpt", 0.5, example_inputs=x)
    with pytest.raises(ValueError, match="damp=-1"):
        methods.get("sparsegpt", damp=-1.0)
    broken = copy.deepcopy(model)
    broken[0].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of '2\.weight' are NaN or infinite"):
        solve(broken, x)
    broken = copy.deepcopy(model)
    broken[2].weight.data[1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"weights of '2\.weight' are NaN or infinite"):
        solve(broken, x)
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    tokens = torch.tensor([[1, 7]])
    with pytest.raises(ValueError, match="tokens of data run from 1 to 7, but embedding '0' has 5 rows"):
        fxprune.apply(
            words, "sparsegpt", 0.5, example_inputs=tokens % 5, data=(tokens, torch.zeros(1)), progress=False
        )
    with pytest.raises(ValueError, match="data has 'y', the model takes"):
        fxprune.apply(model, "sparsegpt", 0.5, example_inputs=x, data={"input": x, "y": x}, progress=False)


def _in_a_process(rank: int) -> Any:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double(), correlated(60, 6)
    group = torch.distributed.group.WORLD
    return solve(model, x[30 * rank : 30 * rank + 30], group=group)


@pytest.mark.slow
def test_several_processes_find_what_one_finds_on_all_data() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double(), correlated(60, 6)
    masks, weights = solve(model, x)
    for found, values in together(2, _in_a_process):
        for name in masks:
            assert torch.equal(found[name], masks[name])
            assert torch.allclose(values[name], weights[name])
