"""Reconstruction against torch.linalg.lstsq, layer by layer."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring.processes import together
from torch import Tensor, nn
from torch.nn.functional import unfold

import fxprune
from fxprune.scoring import sequential

EXACT: dict[str, Any] = {"damp": 0.0, "bias": False, "progress": False, "iterations": 400}


def data(rows: int, inputs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, inputs).double() @ torch.randn(inputs, inputs).double(), torch.zeros(rows)


def prune(model: nn.Module, given: Any, method: str = "magnitude", **options: Any) -> Any:
    options.setdefault("budget", "uniform")
    more = {"data": given} if method != "magnitude" else {}
    return fxprune.apply(model, method, 0.5, example_inputs=given[0], progress=False, **more, **options)


def least_squares(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """(outputs, inputs): every output from its kept inputs."""
    weight = torch.zeros(keep.shape, dtype=x.dtype)
    for row in range(len(keep)):
        weight[row, keep[row]] = torch.linalg.lstsq(x[:, keep[row]], y[:, row]).solution
    return weight


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_layers_are_fitted_to_the_dense_outputs_one_after_another(method: str) -> None:
    model, given = two_layers(), data(80, 6)
    pruned = prune(model, given, method)
    fitted = fxprune.reconstruct(pruned, given, model, **EXACT)
    masks, x = fxprune.masks(pruned), given[0]
    first = least_squares(x, x @ model[0].weight.T, masks["0.weight"])
    assert torch.allclose(fitted.get_parameter("0.weight"), first, atol=1e-5)
    own, dense = torch.tanh(x @ first.T + model[0].bias), torch.tanh(model[0](x))
    second = least_squares(own.detach(), (dense @ model[2].weight.T).detach(), masks["2.weight"])
    assert torch.allclose(fitted.get_parameter("2.weight"), second, atol=1e-5)


def test_each_layer_alone() -> None:
    model, given = two_layers(), data(80, 6)
    pruned = prune(model, given)
    fitted = fxprune.reconstruct(pruned, given, model, propagate=False, **EXACT)
    # Without propagation a layer's inputs are those of the pruned network as it came in.
    hidden = torch.tanh(fxprune.finalize(pruned).get_submodule("0")(given[0])).detach()
    second = least_squares(hidden, (hidden @ model[2].weight.T).detach(), fxprune.masks(pruned)["2.weight"])
    assert torch.allclose(fitted.get_parameter("2.weight"), second, atol=1e-5)


def test_alone_a_layer_does_not_see_the_fitted_biases_of_others() -> None:
    model, given = two_layers(), data(80, 6)
    given = (given[0] + 2, given[1])
    pruned = prune(model, given)
    fitted = fxprune.reconstruct(pruned, given, model, propagate=False, **{**EXACT, "bias": True})
    hidden = torch.tanh(fxprune.finalize(pruned).get_submodule("0")(given[0])).detach()
    keep, ones = fxprune.masks(pruned)["2.weight"], torch.ones(80, 1).double()
    keep = torch.cat([keep, torch.ones(4, 1, dtype=torch.bool)], 1)
    second = least_squares(torch.cat([hidden, ones], 1), model[2](hidden).detach(), keep)
    assert torch.allclose(fitted.get_parameter("2.weight"), second[:, :-1], atol=1e-5)
    assert torch.allclose(fitted.get_parameter("2.bias"), second[:, -1], atol=1e-5)


def test_biases_are_fitted_with_their_layers() -> None:
    model, given = two_layers(), data(80, 6)
    given = (given[0] + 2, given[1])
    pruned = prune(model, given)
    fitted = fxprune.reconstruct(pruned, given, model, **{**EXACT, "bias": True})
    x, keep = given[0], fxprune.masks(pruned)["0.weight"]
    ones = torch.ones(len(x), 1).double()
    keep = torch.cat([keep, torch.ones(len(keep), 1, dtype=torch.bool)], 1)
    expected = least_squares(torch.cat([x, ones], 1), model[0](x).detach(), keep)
    assert torch.allclose(fitted.get_parameter("0.weight"), expected[:, :-1], atol=1e-5)
    assert torch.allclose(fitted.get_parameter("0.bias"), expected[:, -1], atol=1e-5)


def test_damping_holds_weights_to_the_dense_ones() -> None:
    model, given = nn.Sequential(nn.Linear(12, 5, bias=False)).double(), data(7, 12)
    pruned = prune(model, given)
    with pytest.warns(UserWarning, match="'0.weight' has 7 for 12, so that its Hessian has rank 7 at most"):
        fitted = fxprune.reconstruct(pruned, given, model, **{**EXACT, "damp": 0.1})
    x, weight = given[0], model[0].weight.detach()
    root = (0.1 * x.square().sum(0).mean()).sqrt() * torch.eye(12).double()
    expected = least_squares(
        torch.cat([x, root]), torch.cat([x @ weight.T, root @ weight.T]), fxprune.masks(pruned)["0.weight"]
    )
    assert torch.allclose(fitted.get_parameter("0.weight"), expected, atol=1e-5)


def test_few_inputs_do_not_spoil_the_outputs_for_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 40)).double()
    every = torch.relu(torch.randn(3000, 20).double() @ torch.randn(20, 80).double()) + torch.rand(3000, 80)
    given, others = (every[:60], torch.zeros(60)), every[60:]
    pruned = prune(model, given)

    def error(one: nn.Module) -> float:
        return float((one(others) - model(others)).detach().square().sum())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = fxprune.reconstruct(pruned, given, model, progress=False)
        spoilt = fxprune.reconstruct(pruned, given, model, damp=1e-4, progress=False)
        same = fxprune.reconstruct(pruned, given, model, damp=10, progress=False)
    assert torch.equal(held.get_parameter("0.weight"), same.get_parameter("0.weight"))
    assert error(held) < 0.8 * error(pruned)
    assert error(held) < 0.9 * error(spoilt)


def test_the_damping_is_8_times_the_inputs_over_the_rows() -> None:
    model, given = nn.Sequential(nn.Linear(12, 5)).double(), data(400, 12)
    pruned = prune(model, given)
    default = fxprune.reconstruct(pruned, given, model, progress=False)
    same = fxprune.reconstruct(pruned, given, model, damp=8 * 12 / 400, progress=False)
    assert torch.equal(default.get_parameter("0.weight"), same.get_parameter("0.weight"))


def test_convolutions_in_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)).double()
    x = torch.randn(9, 4, 6, 6).double().cumsum(1)
    given = (x, torch.zeros(9))
    pruned = prune(model, given)
    fitted = fxprune.reconstruct(pruned, given, model, **EXACT)
    windows = unfold(x, 3, padding=1).permute(0, 2, 1).reshape(-1, 2, 18)
    weight, keep = model[0].weight.detach().flatten(1), fxprune.masks(pruned)["0.weight"].flatten(1)
    for group, rows in enumerate((slice(0, 3), slice(3, 6))):
        expected = least_squares(windows[:, group], windows[:, group] @ weight[rows].T, keep[rows])
        assert torch.allclose(fitted.get_parameter("0.weight").flatten(1)[rows], expected, atol=1e-5)


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    model, given = nn.Sequential(nn.Linear(6, 5, bias=False)).double(), data(40, 6)
    given[0][:, 2] = 0
    pruned = prune(model, given)
    fitted = fxprune.reconstruct(pruned, given, model, **EXACT)
    before, after = pruned.get_parameter("0.weight"), fitted.get_parameter("0.weight")
    assert torch.equal(before[:, 2], after[:, 2])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_batch_norms_give_the_dense_mean_and_variance() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    x = torch.rand(32, 3, 8, 8)
    model(x)
    model.eval()
    given = (x, torch.zeros(32))
    pruned = prune(model, given)
    fitted = fxprune.finalize(fxprune.reconstruct(pruned, given, model, progress=False))
    norm, dense = fitted.get_submodule("1")(fitted.get_submodule("0")(x)), model[1](model[0](x))
    assert torch.allclose(norm.mean((0, 2, 3)), dense.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.var((0, 2, 3)), dense.var((0, 2, 3)), atol=1e-4)
    same = fxprune.reconstruct(pruned, given, model, norms=False, progress=False)
    assert torch.equal(same.get_buffer("1.running_mean"), model[1].running_mean)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("returns", ["graph", "module"])
@pytest.mark.parametrize("granularity", ["weight", "nm(2,4)", "channel"])
def test_the_kind_of_model_and_the_masks_stay_and_the_caller_s_model_too(
    returns: str, granularity: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    x = torch.rand(200, 8)
    given = (x, torch.zeros(200))
    budget = "global" if granularity == "channel" else "uniform"
    pruned = prune(model, given, granularity=granularity, returns=returns, budget=budget)
    states = [copy.deepcopy(one.state_dict()) for one in (pruned, model)]
    random = torch.get_rng_state()
    fitted = fxprune.reconstruct(pruned, given, model, example_inputs=x, progress=False)
    assert torch.equal(random, torch.get_rng_state())
    assert type(fitted).__name__ == type(pruned).__name__
    assert fitted.training == pruned.training
    masks, found = fxprune.masks(pruned), fxprune.masks(fitted)
    assert masks.keys() == found.keys()
    assert all(torch.equal(masks[name], found[name]) for name in masks)
    fxprune.verify(fitted)
    for one, state in zip((pruned, model), states, strict=True):
        assert all(torch.equal(state[name], value) for name, value in one.state_dict().items())
    model.eval()

    def error(one: nn.Module) -> float:
        return float((one.eval()(x) - model(x)).detach().square().mean())

    assert error(fitted) < 0.5 * error(pruned)


def test_a_plain_model_with_zeros() -> None:
    model, given = two_layers(), data(80, 6)
    pruned = prune(model, given)
    masked = fxprune.reconstruct(pruned, given, model, **EXACT)
    plain = fxprune.reconstruct(fxprune.finalize(pruned), given, model, **EXACT)
    assert not fxprune.masks(plain)
    assert torch.equal(plain.get_parameter("2.weight"), masked.get_parameter("2.weight"))


def test_a_module_takes_its_shapes_from_the_data() -> None:
    model, given = two_layers(), data(80, 6)
    pruned = prune(model, given, returns="module")
    expected = fxprune.reconstruct(pruned, given, model, example_inputs=given[0], **EXACT)
    # An iterator is not spent on its shapes.
    fitted = fxprune.reconstruct(pruned, iter([given]), model, **EXACT)
    assert torch.equal(fitted.get_parameter("0.weight"), expected.get_parameter("0.weight"))
    assert not torch.equal(fitted.get_parameter("0.weight"), pruned.get_parameter("0.weight"))


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_computed_weights_stay_and_are_named(returns: str) -> None:
    model, given = two_layers(), data(80, 6)
    nn.utils.parametrizations.weight_norm(model[0])
    pruned = prune(model, given, "wanda", returns=returns)
    with pytest.warns(UserWarning, match=r"reconstruct: '0\.weight' is computed .*fxprune\.finalize"):
        fitted = fxprune.reconstruct(pruned, given, model, **EXACT)
    masks, x = fxprune.masks(fitted), given[0]
    first = model[0].weight.detach() * masks["0.weight"]
    assert all(torch.equal(mask, fxprune.masks(pruned)[name]) for name, mask in masks.items())
    own, dense = torch.tanh(nn.functional.linear(x, first, model[0].bias)), torch.tanh(model[0](x))
    second = least_squares(own.detach(), (dense @ model[2].weight.T).detach(), masks["2.weight"])
    assert torch.allclose(fitted.get_parameter("2.weight"), second, atol=1e-5)


def test_nothing_but_computed_weights() -> None:
    given = data(80, 6)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))).double()
    pruned = prune(model, given)
    with pytest.raises(ValueError, match=r"'0\.weight' is computed .*take fxprune\.finalize\(model\)"):
        fxprune.reconstruct(pruned, given, model, **EXACT)


def test_a_model_without_a_graph() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_layers()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) < 1e9 else x

    model, given = Counted(), data(80, 6)
    with pytest.warns(UserWarning, match="pruned without a graph"):
        pruned = prune(model, given, returns="module")
    fitted = fxprune.reconstruct(pruned, given, model, **EXACT)
    expected = fxprune.reconstruct(prune(model.inner, given), given, model.inner, **EXACT)
    for name in ("0.weight", "2.weight"):
        found = fitted.get_parameter(f"inner.{name}")
        assert torch.allclose(found, expected.get_parameter(name), atol=1e-5)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5 * 4, 4),
    ).double()  # fmt: skip
    model(IMAGES)
    return model.eval()


IMAGES = torch.rand(71, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def same_state(one: nn.Module, other: nn.Module, close: bool = False) -> bool:
    states = [network.state_dict() for network in (one, other)]
    equal = torch.allclose if close else torch.equal
    return states[0].keys() == states[1].keys() and all(
        equal(value, states[1][name]) for name, value in states[0].items()
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("propagate", [True, False])
def test_a_killed_run_goes_on_at_the_next_layer(
    propagate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = convolutions(), (IMAGES, torch.zeros(71))
    pruned = prune(model, given)
    options: dict[str, Any] = {"progress": False, "propagate": propagate}
    wanted = fxprune.reconstruct(pruned, given, model, **options)
    solved: list[str] = []
    original = sequential._Run._layer

    def killed(self: Any, name: str, parts: Any) -> Any:
        solved.append(name)
        if name == "8.weight" and solved.count(name) == 1:
            raise KeyboardInterrupt
        return original(self, name, parts)

    monkeypatch.setattr(sequential._Run, "_layer", killed)
    options["checkpoint_dir"] = tmp_path / "solved"
    with pytest.raises(KeyboardInterrupt):
        fxprune.reconstruct(pruned, given, model, **options)
    found = fxprune.reconstruct(pruned, given, model, **options)
    assert solved == ["0.weight", "3.weight", "8.weight", "8.weight"]
    assert same_state(found, wanted)
    assert not torch.equal(found.get_parameter("0.bias"), pruned.get_parameter("0.bias"))
    # A third run has all layers, and fits none.
    assert same_state(fxprune.reconstruct(pruned, given, model, **options), wanted)
    assert len(solved) == 4


def test_fitted_layers_of_another_run_are_refused(tmp_path: Path) -> None:
    model, given = two_layers(), data(80, 6)
    pruned, options = prune(model, given), {"checkpoint_dir": str(tmp_path / "solved"), **EXACT}
    fxprune.reconstruct(pruned, given, model, **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (given, model, {"damp": 0.5}, "damp"),
        (given, other, {}, "reference"),
        ((given[0] + 1, given[1]), model, {}, "data"),
    ]
    for batch, reference, more, what in cases:
        with pytest.raises(ValueError, match=rf"checkpoint_dir: .* is of another run \(other {what}\)"):
            fxprune.reconstruct(pruned, batch, reference, **{**options, **more})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint_dir: .*file is a file; expected a folder"):
        fxprune.reconstruct(pruned, given, model, **{**options, "checkpoint_dir": str(tmp_path / "file")})


def in_a_process(rank: int, folder: str) -> Any:
    """Fit on a shard of 40 samples, or 31; then with a folder, twice; then with other masks."""
    model, shard = convolutions(), (IMAGES[:40], IMAGES[40:])[rank]
    given = (shard, torch.zeros(len(shard)))
    pruned = prune(model, given)
    found = [
        fxprune.reconstruct(pruned, given, model, progress=False, **more).state_dict()
        for more in ({}, {"checkpoint_dir": folder}, {"checkpoint_dir": folder})
    ]
    if rank:
        masks = fxprune.masks(pruned)
        fxprune.set_masks(pruned, {**masks, "8.weight": masks["8.weight"].roll(1, 0)})
    try:
        fxprune.reconstruct(pruned, given, model, progress=False)
    except RuntimeError as error:
        return found, str(error)


@pytest.mark.slow
def test_several_processes_fit_what_one_fits_on_all_data(tmp_path: Path) -> None:
    model, given = convolutions(), (IMAGES, torch.zeros(71))
    wanted = fxprune.reconstruct(prune(model, given), given, model, progress=False).state_dict()
    results = together(2, in_a_process, str(tmp_path))
    for found, error in results:
        assert error.startswith("masks of ranks [1] differ from those of rank 0; give every process the same")
        for state in found:
            assert state.keys() == wanted.keys()
            assert all(torch.allclose(state[name], value, atol=1e-9) for name, value in wanted.items())
    first, second = (found for found, _ in results)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_bad_arguments_are_refused() -> None:
    model, given = two_layers(), data(80, 6)
    pruned = prune(model, given)
    with pytest.raises(ValueError, match="it has no masks and no zeros"):
        fxprune.reconstruct(model, given, model, example_inputs=given[0])
    with pytest.raises(ValueError, match=r"reference: parameter '0\.weight' of shape \(10, 6\) is wanted"):
        fxprune.reconstruct(pruned, given, nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"reference: expected a torch\.nn\.Module, got a int"):
        fxprune.reconstruct(pruned, given, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damp=-1"):
        fxprune.reconstruct(pruned, given, model, damp=-1)
    with pytest.raises(ValueError, match="iterations=0"):
        fxprune.reconstruct(pruned, given, model, iterations=0)
    with pytest.raises(ValueError, match="needs data="):
        fxprune.reconstruct(pruned, None, model)
