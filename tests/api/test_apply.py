"""apply: what comes out, what is left alone, and what a second time does."""

import copy
import gc
import signal
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

import fxprune
from fxprune import api, methods
from fxprune.methods import Problem
from fxprune.sparsity.masks import Masks


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


IMAGES = torch.ones(2, 3, 8, 8)


def prune(model: nn.Module, method: Any = "magnitude", sparsity: float = 0.5, **options: Any) -> Any:
    options.setdefault("example_inputs", IMAGES)
    return fxprune.apply(model, method, sparsity, **options)


def kept(model: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in fxprune.masks(model).values())


def test_the_package_has_exactly_these_names() -> None:
    first = "remap_optimizer apply bench capture channel_groups lower masks set_masks analyze"
    second = "compact export finalize verify save load load_masks list_methods Method plot_history sweep"
    training = "Pruner lottery load_ticket Plan plan regularizer evaluate recalibrate reconstruct"
    assert sorted(fxprune.__all__) == sorted(f"{first} {second} {training}".split())
    assert all(callable(getattr(fxprune, name)) for name in fxprune.__all__)


def test_a_graph_comes_out_masked_and_equal_to_the_model_with_zeros() -> None:
    model = small_net().eval()
    pruned = prune(model)
    assert isinstance(pruned, fx.GraphModule)
    assert list(fxprune.masks(pruned)) == ["0.weight", "3.weight", "6.weight"]
    fxprune.verify(pruned)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in fxprune.masks(pruned).items():
            zeroed.get_parameter(name).mul_(mask)
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(pruned(x), zeroed(x), atol=1e-6)


READERS = [name for name in methods.names() if methods.get(name).reads_only]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_methods_that_only_read_get_the_caller_s_weights_and_leave_them(name: str, granularity: str) -> None:
    model = small_net()
    method, seen = methods.get(name), []
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    versions = {key: parameter._version for key, parameter in model.named_parameters()}

    def find(problem: Problem) -> Masks:
        found = method.find(problem)
        own = dict(model.named_parameters())
        seen.append(
            {key: weight.data_ptr() == own[key].data_ptr() for key, weight in problem.weights.items()}
        )
        assert {key: own[key]._version for key in versions} == versions
        return found

    watching = replace(method, find=find)
    pruned = prune(model, watching, 0.5, returns="module", granularity=granularity, on_collapse="repair")
    assert all(seen[0].values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert any(bool((~mask).any()) for mask in fxprune.masks(pruned).values())
    prune(model, watching, 0.5, granularity=granularity, on_collapse="repair")
    assert not any(seen[1].values())  # the copy becomes the result


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_the_callers_model_and_random_state_are_left_alone(returns: str) -> None:
    model = small_net().train()
    model[1].eval()
    model(IMAGES).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    pruned = prune(model, "random", 0.8, returns=returns)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))
    assert model.training
    assert not model[1].training
    assert pruned.training
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in pruned.parameters()}
    assert not shared


@pytest.mark.slow
def test_returns_module_keeps_the_users_class() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    pruned = fxprune.apply(model, "random", 0.5, returns="module")
    assert type(pruned) is type(model)
    assert pruned.pretrained_cfg == model.pretrained_cfg
    assert pruned.forward_features(torch.ones(1, 3, 32, 32)).shape[0] == 1
    fxprune.verify(pruned)
    graph = fxprune.apply(model, "random", 0.5)
    masks = fxprune.masks(pruned)
    assert masks.keys() == fxprune.masks(graph).keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(graph).items())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(pruned.eval()(x), graph.eval()(x), atol=1e-5)


def test_returns_module_masks_parameters_that_others_read() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.nn.functional.linear(x, self.inner.weight))

    torch.manual_seed(0)
    pruned = fxprune.apply(Reads(), "random", 0.5, example_inputs=torch.ones(2, 6), returns="module")
    assert set(fxprune.masks(pruned)) == {"inner.weight", "head.weight"}
    with torch.no_grad():
        pruned.inner.weight.fill_(1.0)  # behind the mask's back
        ones = pruned.inner.weight * fxprune.masks(pruned)["inner.weight"]
        x = torch.randn(2, 6)
        assert torch.allclose(pruned(x), pruned.head(x @ ones.T), atol=1e-6)


def test_inplace_prunes_the_model_itself() -> None:
    model = small_net()
    weights = {id(parameter) for parameter in model.parameters()}
    expected = prune(model, "random", 0.5, returns="module")
    assert not fxprune.masks(model)
    assert prune(model, "random", 0.5, returns="inplace") is model
    assert {id(parameter) for parameter in model.parameters()} == weights
    fxprune.verify(model)
    for other in (expected, prune(small_net(), "random", 0.5)):
        masks = fxprune.masks(other)
        assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(model).items())
    before = fxprune.masks(model)
    prune(model, "magnitude", 0.8, returns="inplace")
    assert all(not bool((mask & ~before[name]).any()) for name, mask in fxprune.masks(model).items())
    assert kept(model) == round(0.2 * (8 * 27 + 8 * 72 + 8 * 4))
    gm = fxprune.capture(small_net(), IMAGES)
    assert prune(gm, "random", 0.5, returns="inplace") is gm
    assert kept(gm) == kept(expected)
    fxprune.verify(gm)


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_pruning_again_only_removes(returns: str) -> None:
    first = prune(small_net(), "random", 0.3, returns=returns, exclude="6")
    second = prune(first, "random", 0.6, seed=5, returns=returns)
    before, after = fxprune.masks(first), fxprune.masks(second)
    assert all(not bool((after[name] & ~before[name]).any()) for name in before)
    assert kept(second) == round(0.4 * sum(mask.numel() for mask in after.values()))
    fxprune.verify(second)
    assert kept(first) == round(0.7 * (8 * 27 + 8 * 72)), "the first result was changed"
    with pytest.raises(ValueError, match="pruning again only removes more"):
        prune(second, "random", 0.5)


def test_an_excluded_layer_keeps_the_mask_that_it_has() -> None:
    first = prune(small_net(), "random", 0.5)
    second = prune(first, "random", 0.7, exclude=["6", nn.BatchNorm2d])
    assert torch.equal(fxprune.masks(first)["6.weight"], fxprune.masks(second)["6.weight"])


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("0", ["3.weight", "6.weight"]),
        (["0", "6.weight"], ["3.weight"]),
        (nn.Conv2d, ["6.weight"]),
        ("[36]*", ["0.weight"]),
        ((nn.Linear, "0"), ["3.weight"]),
    ],
)
def test_exclude(exclude: Any, left: list[str]) -> None:
    pruned = prune(small_net(), "random", exclude=exclude)
    assert list(fxprune.masks(pruned)) == left
    size = sum(mask.numel() for mask in fxprune.masks(pruned).values())
    assert kept(pruned) == size // 2


def test_the_seed_decides_and_nothing_else() -> None:
    one = fxprune.masks(prune(small_net(), "random", seed=1))
    torch.manual_seed(123)
    same = fxprune.masks(prune(small_net(), "random", seed=1, device="cpu"))
    other = fxprune.masks(prune(small_net(), "random", seed=2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_it_works_where_gradients_are_off() -> None:
    model = small_net()
    plain = fxprune.masks(prune(model, "synflow", rounds=3))
    with torch.no_grad():
        quiet = prune(model, "synflow", rounds=3)
    with torch.inference_mode():
        inferred = prune(model, "synflow", rounds=3)
    for pruned in (quiet, inferred):
        assert all(torch.equal(mask, plain[name]) for name, mask in fxprune.masks(pruned).items())
        pruned(IMAGES).sum().backward()
        assert pruned.get_parameter("0.weight").grad is not None


def test_a_method_of_ones_own() -> None:
    def find(problem: Problem) -> dict[str, torch.Tensor]:
        masks, left = {}, problem.budget.total
        for name, weight in problem.weights.items():
            number = min(left, weight.numel())
            masks[name] = (torch.arange(weight.numel()) < number).view(weight.shape)
            left -= number
        return masks

    with pytest.warns(UserWarning, match="layer collapse"):
        pruned = prune(small_net(), fxprune.Method("first", find), 0.5)
    assert kept(pruned) == (8 * 27 + 8 * 72 + 32) // 2
    fxprune.verify(pruned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: [*masks], "returned a list, expected a dict of masks"),
        (lambda masks: {**masks, "x": masks["0.weight"]}, "returned wrong masks: no prunable parameter 'x'"),
        (
            lambda masks: {n: m.float() for n, m in masks.items()},
            r"returned wrong masks\['0.weight'\] has dtype",
        ),
        (lambda masks: {n: ~m for n, m in masks.items()}, "keeps 0 weights in the model, not"),
    ],
)
def test_a_method_that_returns_something_else_is_caught(change: Any, message: str) -> None:
    method = fxprune.Method("odd", lambda problem: change(problem.masks))
    with pytest.raises((TypeError, ValueError), match=message):
        prune(small_net(), method, 0.5)


def test_interrupted_it_leaves_the_model_as_it_was() -> None:
    def find(problem: Problem) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        return dict(problem.masks)

    model = small_net()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    # Shells start what runs in the background with this signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # what is raised in its callbacks is lost
    try:
        with pytest.raises(KeyboardInterrupt):
            prune(model, fxprune.Method("slow", find), 0.5)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, handler)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_files_say_where_the_masks_come_from(tmp_path: Any) -> None:
    pruned = prune(small_net(), "random", 0.5, seed=7)
    fxprune.save(pruned, tmp_path / "masks.safetensors")
    masks = fxprune.load_masks(tmp_path / "masks.safetensors")
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(pruned).items())
    assert api.read(pruned).keys() == masks.keys()
    header = fxprune.rewrite.read_header(tmp_path / "masks.safetensors")
    assert (header["method"], header["sparsity"], header["seed"]) == ("random", "0.5", "7")


def test_budgets_and_granularity_reach_the_method() -> None:
    masks = fxprune.masks(prune(small_net(), "random", 0.5, budget={"0": 0.25, "6.*": 0.0}))
    assert [int(mask.sum()) for mask in masks.values()] == [162, 288, 32]
    kernels = fxprune.masks(prune(small_net(), "random", 0.5, granularity="kernel"))["3.weight"]
    assert set(kernels.sum((2, 3)).unique().tolist()) <= {0, 9}


def test_pool_decides_which_channels_go() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 0.0], [2.5, 2.5], [9.0, 9.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]]))
    gone = {}
    for pool in ("mean", "max"):
        pruned = prune(
            model, sparsity=1 / 3, granularity="channel", pool=pool, example_inputs=torch.ones(1, 2)
        )
        gone[pool] = (~fxprune.masks(pruned)["0.weight"]).all(1).nonzero().flatten().tolist()
    assert gone == {"mean": [0], "max": [1]}
    with pytest.raises(ValueError, match="pool='sum': granularity 'weight' has none"):
        prune(model, pool="sum", example_inputs=torch.ones(1, 2))
