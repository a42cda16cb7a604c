"""Attention and encoder layers read weights of children without calling them: masked in every mode."""

import copy
import pickle

import pytest
import torch
from thinning import one_in
from torch import nn

from fxprune.rewrite import finalize, install, read, set_masks, verify
from rewrite import nets

KINDS = {"one": {}, "three": {"kdim": 6, "vdim": 6}, "bias": {"add_bias_kv": True}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind):
    """A masked attention block, an original one with the same zeroed weights, an input, the masks."""
    torch.manual_seed(0)
    block = nets.Attention(**KINDS[kind])
    masks = {name: mask for name, mask in nets.masks_for(block).items() if name.endswith("weight")}
    original = copy.deepcopy(block)
    install(block, masks)
    original.load_state_dict(block.state_dict(), strict=False)
    return block, original, torch.randn(2, 5, 8), masks


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_forward(kind, training, grad):
    block, original, x, _ = pair(kind)
    block.train(training)
    original.train(training)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(block(x), original(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "training", "grad"), one_in(3, KINDS, [True, False], [True, False]))
def test_compiled(kind, training, grad):
    block, original, x, _ = pair(kind)
    block.train(training)
    original.train(training)
    with torch.set_grad_enabled(grad):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), original(x), atol=1e-6)


@every_kind
def test_the_mask_counts_and_not_the_storage_alone(kind):
    """With garbage in pruned storage, the layer still computes with zeros, and its gradients stay zero."""
    block, original, x, masks = pair(kind)
    expected = original(x)
    with torch.no_grad():
        for name, mask in masks.items():
            block.get_parameter(name).masked_fill_(~mask, 3.0)
    assert torch.allclose(block(x), expected, atol=1e-6)
    block.eval()
    with torch.no_grad():
        assert torch.allclose(block(x), expected, atol=1e-6)
    for _ in range(2):
        block.zero_grad()
        block(x).square().sum().backward()
        assert nets.pruned_gradients_are_zero(block, masks)


@every_kind
def test_copies_finalize_verify(kind):
    block, original, x, masks = pair(kind)
    verify(block)
    assert set(read(block)) == set(masks)
    assert set(block.state_dict()) - set(original.state_dict()) == {name + "_mask" for name in masks}
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        verify(twin)
    final = finalize(block)
    assert type(final.attention) is nn.MultiheadAttention
    assert torch.equal(final(x), block(x))
    with torch.no_grad():
        block.get_parameter("attention.out_proj.weight").add_(1)
    with pytest.raises(RuntimeError, match=r"attention\.out_proj\.weight: \d+ pruned weights"):
        verify(block)


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore:While .*, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    block, _, x, _ = pair("one")
    program = torch.export.export(block.eval(), (x,), strict=strict)
    assert torch.allclose(program.module()(x), block(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:set_masks. 1 masks were set:UserWarning")
def test_masks_may_come_one_after_the_other():
    block, original, x, masks = pair("one")
    again = nets.Attention()
    again.load_state_dict(original.state_dict())
    for name in sorted(masks, reverse=True):
        set_masks(again, {name: masks[name]})
    with torch.no_grad():
        for name, mask in masks.items():
            again.get_parameter(name).masked_fill_(~mask, 3.0)
    assert torch.allclose(again(x), block(x), atol=1e-6)


def encoder_pair(nested, training):
    """A masked encoder, an original one with the same zeroed weights, an input, the masks."""
    torch.manual_seed(0)
    model = nets.Encoder(nested)
    original = copy.deepcopy(model)
    masks = nets.masks_for(model)
    install(model, masks)
    original.load_state_dict(model.state_dict(), strict=False)
    return model.train(training), original.train(training), torch.randn(2, 5, 8), masks


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_encoder(nested, training, grad):
    model, original, x, masks = encoder_pair(nested, training)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        for arguments in ((x,), (x, padding)):
            found, expected = model(*arguments), original(*arguments)
            assert torch.allclose(found, expected, atol=1e-5)
    if training and grad:
        model(x).square().sum().backward()
        assert nets.pruned_gradients_are_zero(model, masks)
    verify(model)
    assert torch.allclose(finalize(model)(x), model(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(
    ("nested", "training", "grad"), one_in(3, [True, False], [True, False], [True, False])
)
def test_a_compiled_encoder(nested, training, grad):
    model, original, x, _ = encoder_pair(nested, training)
    with torch.set_grad_enabled(grad):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), original(x), atol=1e-5)
