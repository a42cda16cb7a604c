"""The activity of outputs depends on the data and the masks, and has no largest number."""

import pytest
import torch
from torch import nn

from fxprune.methods.px.output_activity import output_activities
from fxprune.scoring.data import Batch
from methods.px.problems import X, activities, mlp, px_problem


def test_activity_depends_on_the_data_alone_once_the_masks_are_given() -> None:
    asked = px_problem(mlp(), (X, torch.zeros(6)))
    twice = px_problem(mlp(), (torch.cat([X, X]), torch.zeros(12)))
    assert torch.allclose(2 * activities(asked)[0], activities(twice)[0])


@pytest.mark.slow
def test_more_paths_than_a_float_can_count() -> None:
    # Every path is active, each layer multiplies their number by 64: 64^400 is 10^722.
    layers = [layer for _ in range(400) for layer in (nn.Linear(64, 64, bias=False), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(2**-6)
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    masks["800.weight"][0, ::2] = False
    (found,) = output_activities(px_problem(net, (x, None), masks=masks), masks, [Batch(x)])
    assert torch.allclose(found.values / found.values[1], torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))
    expected = float(x.double().square().sum().log2()) + 400 * 6
    assert float(found.values[1].log2()) + found.power == pytest.approx(expected, abs=1e-5)
