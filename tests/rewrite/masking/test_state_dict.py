"""Checkpoints go in and out: our own, dense, prune's, parametrize's, the research repositories'."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize, prune

import fxprune
from fxprune.rewrite import finalize, read, set_masks, verify
from rewrite import nets

every_assign = pytest.mark.parametrize("assign", [True, False])


@pytest.fixture
def model():
    made = nets.small_cnn()
    set_masks(made, nets.masks_for(made))
    return made


def fresh(seed=9):
    other = nets.small_cnn()
    set_masks(other, nets.masks_for(other, seed=seed))
    return other


@every_assign
def test_masked_to_masked(model, assign):
    other = fresh()
    x = torch.randn(2, 3, 8, 8)
    result = other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other.eval()(x), model.eval()(x))
    verify(other)
    assert all(torch.equal(mask, read(other)[name]) for name, mask in read(model).items())


@every_assign
def test_dense_to_masked(model, assign):
    dense = nets.small_cnn()
    with torch.no_grad():
        dense[0].weight.add_(1)
    masks = read(model)
    with pytest.warns(UserWarning, match="no masks: the model keeps its own") as caught:
        model.load_state_dict(dense.state_dict(), assign=assign)
    assert len(caught) == 1, "one warning for one load"
    for name, mask in masks.items():
        assert torch.equal(read(model)[name], mask), "a dense checkpoint does not un-prune"
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name) * mask)
    verify(model)
    with pytest.warns(UserWarning, match="no masks: the model keeps its own"):
        model.load_state_dict(dense.state_dict())
    set_masks(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(dense.state_dict(), assign=assign)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), dense.eval()(x)), "masks of ones, for they were asked for"


def test_a_finalized_checkpoint_loads_without_a_word(model):
    other = fresh(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(finalize(model).state_dict())
    verify(other)


def test_several_masks_of_one_weight_are_combined(model):
    """``parametrize`` may hold a sparsifier after another, beside a mask of one's own: all of them count."""
    state = model.state_dict()
    weight = state.pop("0.weight")
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(weight.shape, generator=generator) < 0.7 for _ in range(3)]
    state["0.weight_mask"] = masks[0].float()
    state["0.parametrizations.weight.original"] = torch.ones_like(weight)
    state["0.parametrizations.weight.0.mask"] = masks[1]
    state["0.parametrizations.weight.1.mask"] = masks[2].float()
    model.load_state_dict(state)
    wanted = masks[0] & masks[1] & masks[2]
    assert torch.equal(read(model)["0.weight"], wanted)
    assert torch.equal(model[0].weight, wanted.float())


def test_what_is_saved_has_the_zeros(model):
    """Also after writes to the storage behind the masks, by ``.data`` or otherwise."""
    masks = read(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    state = model.state_dict()
    assert all((state[name][~mask] == 0).all() for name, mask in masks.items())
    assert all((state[name][mask] != 0).any() for name, mask in masks.items())
    assert state["0.weight"].data_ptr() == model[0].weight.data_ptr(), "a state dict shares its tensors"
    assert before == {name: parameter._version for name, parameter in model.named_parameters()}


def test_masked_to_dense(model):
    dense = nets.small_cnn()
    result = dense.load_state_dict(model.state_dict(), strict=False)
    assert set(result.unexpected_keys) == {name + "_mask" for name in read(model)}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(dense.eval()(x), model.eval()(x))


def foreign(kind, model, masks):
    """A checkpoint as another tool writes it, with garbage where its mask is zero."""
    if kind == "prune":
        for name, mask in masks.items():
            path, _, attribute = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(path), attribute, mask)
        return model.state_dict()
    if kind == "parametrize":
        for name, mask in masks.items():
            path, _, attribute = name.rpartition(".")
            sparsity = nn.Module()
            sparsity.register_buffer("mask", mask.clone())
            sparsity.forward = lambda weight, sparsity=sparsity: weight * sparsity.mask
            parametrize.register_parametrization(model.get_submodule(path), attribute, sparsity)
        return model.state_dict()
    return {**model.state_dict(), **{name + "_mask": mask.float() for name, mask in masks.items()}}


@every_assign
@pytest.mark.parametrize("kind", ["prune", "parametrize", "research"])
@pytest.mark.parametrize("net", [nets.small_cnn, nets.Attention])
def test_other_tools(net, kind, assign):
    torch.manual_seed(0)
    target = net()
    set_masks(target, nets.masks_for(target, seed=5))
    source = net()
    masks = {name: mask for name, mask in nets.masks_for(source).items() if name in read(target)}
    dense = {key: value.clone() for key, value in source.state_dict().items()}
    checkpoint = foreign(kind, source, masks)
    before = {key: value.clone() for key, value in checkpoint.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(checkpoint, strict=True, assign=assign)
    assert all(torch.equal(read(target)[name], mask) for name, mask in masks.items())
    for name, mask in masks.items():
        assert torch.equal(target.get_parameter(name), dense[name] * mask)
    verify(target)
    assert all(torch.equal(checkpoint[key], value) for key, value in before.items()), "the caller's tensors"


@pytest.mark.slow
def test_compiled_code_sees_loaded_masks(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    compiled(x)
    model.load_state_dict(fresh().state_dict())
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert counter.frame_count == 1


def test_errors_are_torchs_own(model):
    state = dict(model.state_dict())
    state["0.weight"] = torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        fresh().load_state_dict(state)
    del state["0.weight"], state["0.weight_mask"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        fresh().load_state_dict(state)


class OwnState(nn.Linear):
    """Writes its weight and bias into the state by itself."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def test_masks_are_in_the_state_of_layers_that_write_their_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(OwnState(6, 8), nn.Linear(8, 3)), torch.randn(4, 6)
    ways = {"example_inputs": x, "returns": "module", "progress": False}
    first, second = (fxprune.apply(model, "random", 0.5, seed=seed, **ways) for seed in (0, 1))
    state = first.state_dict()
    assert state["0.weight_mask"].dtype == torch.bool
    second.load_state_dict(state)
    torch.testing.assert_close(second(x), first(x))


class ReadsItself(nn.Linear):
    """Reads its state by itself."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("weight", "bias"):
            getattr(self, name).data.copy_(state_dict[prefix + name])


def test_layers_that_read_their_state_have_its_masks():
    masks = [{"0.weight": torch.eye(4, dtype=torch.bool)}, {"0.weight": ~torch.eye(4, dtype=torch.bool)}]
    first, second = nn.Sequential(ReadsItself(4, 4)), nn.Sequential(ReadsItself(4, 4))
    fxprune.set_masks(first, masks[0])
    fxprune.set_masks(second, masks[1])
    second.load_state_dict(first.state_dict())
    assert torch.equal(second[0].weight_mask, masks[0]["0.weight"])
    fxprune.verify(second)
