"""``analyze`` of a model that has zeros and no masks."""

import copy

import torch
from torch import nn

import fxprune


def test_zeros_count_beside_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    pruned = fxprune.apply(net, "magnitude", 0.75, example_inputs=x)
    report = fxprune.analyze(pruned)
    final = fxprune.finalize(pruned)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(final.state_dict())
    for model in (final, fresh):
        found = fxprune.analyze(model, example_inputs=x)
        assert found.sparsity == report.sparsity == 0.75
        assert found.layers == report.layers
        assert found.log_paths == report.log_paths
    assert fxprune.analyze(net, example_inputs=x).sparsity == 0.0


def test_a_kept_weight_that_is_zero_is_kept():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=x)
    name, mask = next(iter(fxprune.masks(pruned).items()))
    with torch.no_grad():
        pruned.get_parameter(name).view(-1)[mask.flatten().nonzero()[0]] = 0.0
    assert fxprune.analyze(pruned).sparsity == 0.5
