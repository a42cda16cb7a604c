"""Findings of ``verify``, and their messages; refusals of scripting, and words about partial masks."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.rewrite import finalize, set_masks, verify
from rewrite import nets


class Mixed(nn.Linear):
    """A layer that multiplies its input with a dense matrix computed from its weight."""

    def forward(self, input):
        mixing = torch.ones(self.in_features, 3)
        return input.sum(-1, keepdim=True) + F.linear(input[..., :3], self.weight @ mixing)


class MixedByMatmul(nn.Linear):
    """The same, by a matrix product instead of a linear call."""

    def forward(self, input):
        mixing = torch.ones(self.in_features, 3)
        return input[..., :3] @ (self.weight @ mixing).t()


@pytest.mark.parametrize("layer", [Mixed, MixedByMatmul])
def test_a_computed_weight_that_is_dense(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(6, 4))
    set_masks(model, nets.masks_for(model, density=0.3))
    with pytest.raises(RuntimeError, match=r"0\.weight: the layer computes from it a weight of shape"):
        verify(model)


def test_not_a_number_is_not_called_a_revived_weight():
    model = nn.Sequential(nn.Linear(4, 3))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 0] = False
    set_masks(model, {"0.weight": mask})
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    verify(model)  # a bias has no part in the gradient of the weight
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"0\.weight: 1 pruned weights are NaN or infinite in storage"):
        verify(model)


class Rooted(nn.Linear):
    """A layer whose gradient is NaN where a weight is zero: the slope of a root there is infinite."""

    def forward(self, input):
        return F.linear(input, self.weight.abs().sqrt())


def test_gradients_that_are_not_a_number():
    torch.manual_seed(0)
    model = nn.Sequential(Rooted(4, 3))
    set_masks(model, nets.masks_for(model))
    with pytest.raises(
        RuntimeError, match=r"0\.weight: \d+ pruned weights are NaN or infinite in the gradient"
    ):
        verify(model)


def test_scripting_a_masked_model_says_what_to_do():
    model = nets.small_cnn()
    set_masks(model, nets.masks_for(model))
    with pytest.raises(RuntimeError, match=r"masked Conv2d cannot be scripted; script fxprune\.finalize"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 8, 8)
    final = finalize(model.eval())
    assert torch.allclose(torch.jit.script(final)(x), final(x), atol=1e-6)


def test_masks_of_a_smaller_model_are_not_set_without_a_word():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(100, 4))
    masks = nets.masks_for(model)
    with pytest.warns(UserWarning, match=r"1 masks were set; 16 of 32 weights, in 1 of 2 .*: 1\.weight"):
        set_masks(model, {"0.weight": masks["0.weight"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_masks(model, {"1.weight": masks["1.weight"]})
        set_masks(copy.deepcopy(model), {"0.weight": masks["0.weight"]})


def test_lowering_sees_the_class_that_a_masked_module_masks():
    plain = nets.small_cnn()
    masked = copy.deepcopy(plain)
    set_masks(masked, nets.masks_for(masked))
    x = torch.randn(2, 3, 8, 8)
    found, wanted = lower(capture(masked, x)), lower(capture(plain, x))
    assert [type(op) for op in found.ops] == [type(op) for op in wanted.ops]
    assert not found.opaque
    assert list(found.kernels) == list(wanted.kernels)


class Chained(nn.Module):
    """Two square weights; the second kernel is scaled by the first weight's mean."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return F.linear(F.linear(x, self.first), self.second * self.first.mean())


def test_a_kernel_may_be_that_of_another_weight_of_the_layer():
    """The denser one of two depends on both weights; its zeros are those of its own mask."""
    torch.manual_seed(0)
    model = nn.Sequential(Chained())
    set_masks(model, {"0.first": torch.rand(6, 6) < 0.2, "0.second": torch.rand(6, 6) < 0.6})
    verify(model)
