"""Refusals of set_masks, which then changes nothing; findings of verify."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fxprune.rewrite import install, set_masks, verify
from rewrite import nets


def kept(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def refused(model, masks, error, *words):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error) as caught:
        set_masks(model, masks)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_wrong_masks():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = {"0.weight": ~kept(3, 2)}
    refused(model, {**good, "2.weight": kept(1, 3)}, ValueError, "2.weight")
    refused(model, {**good, "1.weight": kept(3, 1)}, ValueError, "1.weight", "(3, 1)", "(1, 3)")
    refused(model, {**good, "1.weight": kept(1, 3).float()}, TypeError, "1.weight", "float32", "bool")
    refused(model, {**good, "1.weight": [[True] * 3]}, TypeError, "1.weight", "list")
    refused(model, [good], TypeError, "masks", "list")
    refused(model, {**good, 3: kept(1, 3)}, ValueError, "3")
    with pytest.raises(ValueError, match=r"direct: no parameter 'nothing'"):
        install(model, good, direct=["nothing"])
    set_masks(model, {})
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_weights_that_are_computed_already():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = {"0.weight": ~kept(3, 2)}
    model[1] = prune.l1_unstructured(nn.Linear(3, 1), "weight", 1)
    refused(model, {**good, "1.weight": kept(1, 3)}, ValueError, "1.weight", "prune.remove")
    model[1] = nn.LazyLinear(1)
    with pytest.raises(ValueError, match=r"1\.weight.*lazy"):
        set_masks(model, {"1.weight": kept(1, 3)})
    model[1] = nn.Linear(3, 1)
    model[1].forward = lambda x: x
    refused(model, {**good, "1.weight": kept(1, 3)}, ValueError, "1.weight", "forward")
    model[1] = torch.jit.script(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"1\.weight.*TorchScript"):
        set_masks(model, {"1.weight": kept(1, 3)})


def test_a_kernel_that_no_mask_can_follow():
    class Mixed(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input, self.weight.flip(0) - self.weight.mean())

    refused(nn.Sequential(Mixed(4, 4)), {"0.weight": kept(4, 4)}, ValueError, "0.weight", "kernel")

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.weight.flip(0) - self.weight.mean())

    graph = torch.fx.symbolic_trace(Raw())
    masks = {"first.weight": ~kept(4, 4), "weight": kept(4, 4)}
    refused(graph, masks, ValueError, "'weight'", "kernel")
    assert "_mask" not in graph.code


def test_verify_without_masks():
    with pytest.raises(ValueError, match="no masks"):
        verify(nn.Linear(2, 2))


@pytest.mark.parametrize("name", nets.LAYERS)
def test_verify_finds_drift(name):
    block, _ = nets.layer(name)
    set_masks(block, {"layer.weight": nets.masks_for(block)["layer.weight"]})
    verify(block)
    with torch.no_grad():
        block.layer.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"layer\.weight: \d+ pruned weights are not zero in storage"):
        verify(block)
    block.layer.weight.data.mul_(block.layer.weight_mask)
    block.layer.weight_mask = block.layer.weight_mask.float()
    with pytest.raises((RuntimeError, ValueError)):
        verify(block)


def test_verify_finds_a_bypass():
    def layer():
        one = nn.Conv2d(3, 4, 3)
        set_masks(one, nets.masks_for(one))
        return one

    repara = layer()
    parametrize.register_parametrization(repara, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="weight was re-parametrised"):
        verify(repara)
    replaced = layer()
    replaced.forward = lambda x: x
    with pytest.raises(RuntimeError, match="weight may bypass its mask"):
        verify(replaced)
    biased = layer()
    original = type(biased)
    shifted = {"_conv_forward": lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, w + 1, b)}
    biased.__class__ = type("Shifted", (original,), shifted)
    with pytest.raises(RuntimeError, match=re.escape("pruned weights are not zero in the kernel")):
        verify(biased)
    leaking = layer()
    plain = {"_conv_forward": nn.Conv2d._conv_forward}
    leaking.__class__ = type("Leaking", (type(leaking),), plain)
    with pytest.raises(RuntimeError, match="pruned weights are not zero in the gradient"):
        verify(leaking)


def test_verify_finds_an_unmasked_read():
    gm = torch.fx.symbolic_trace(nets.FunctionalConv())
    set_masks(gm, nets.masks_for(gm))
    (kernel, _) = [node for node in gm.graph.nodes if node.target is torch.conv2d]
    kernel.args = (kernel.args[0], kernel.args[1].args[0])
    gm.recompile()
    with pytest.raises(RuntimeError, match="kernel is read by conv2d without its mask"):
        verify(gm)
    set_masks(gm, {})
    with pytest.raises(RuntimeError, match="without its mask"):
        verify(gm)
    set_masks(gm, nets.masks_for(gm))
    verify(gm)
