"""On every small network the graph says what the oracle says: reach, ln R, derivatives."""

from __future__ import annotations

import pytest
import torch
from nets import NETS
from oracle import prunable, random_masks
from thinning import one_in

from fxprune.paths.count import flow
from lowering.agreement import assert_flow, assert_reach, lowered

DENSITIES = (1.0, 0.7, 0.4, 0.15)
SEEDS = (0, 1)
# A maximum over equal counts has no unique derivative: which entry gets it is the backend's choice.
TIES = {"reused", "max_pool", "conv3d"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "density"), one_in(3, sorted(NETS), DENSITIES))
def test_network(name: str, density: float) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    graph = lowered(model, inputs)
    weights = prunable(model)
    assert {key: kernels.shape for key, kernels in graph.kernels.items()} == {
        key: weight.shape for key, weight in weights.items()
    }
    for seed in SEEDS[:1] if density == 1.0 else SEEDS:
        masks = random_masks(model, density, seed)
        assert_reach(graph, model, inputs, masks)
        floats = {key: mask.double() for key, mask in masks.items()}
        assert_flow(graph, model, inputs, floats, derivatives=name not in TIES)


@pytest.mark.parametrize("name", sorted(TIES))
def test_maximum_pools(name: str) -> None:
    """Wherever the maximum is unique the derivatives agree too; where not, they still add up alike."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    graph = lowered(model, inputs)
    masks = {key: mask.double() for key, mask in random_masks(model, 0.7, 0).items()}
    result = flow(graph, masks, dtype=torch.float64)
    # Euler: R is homogeneous of degree one in each layer that cuts all paths.
    layers = [key for key in graph.kernels if graph.kernels[key].uses == 1]
    for key in layers:
        assert float((result.gradients[key] * masks[key]).sum()) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["residual", "excite_sigmoid", "multihead", "mixer", "vit", "transposed"])
def test_missing_masks_are_dense(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    graph = lowered(model, inputs)
    first = next(iter(graph.kernels))
    masks = {first: random_masks(model, 0.5, 0)[first]}
    assert_reach(graph, model, inputs, masks)
    assert_flow(graph, model, inputs, masks)


@pytest.mark.parametrize("name", ["conv_chain", "residual", "attention", "grouped", "glu_free"])
def test_batch_size_does_not_matter(name: str) -> None:
    """ln R is per sample, whatever batch the shapes were captured with."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    masks = random_masks(model, 0.6, 0)
    one, two = lowered(model, inputs[:1]), lowered(model, inputs)
    assert flow(one, masks).log_total == pytest.approx(flow(two, masks).log_total, rel=1e-6)
    assert [k.macs for k in one.kernels.values()] == [k.macs for k in two.kernels.values()]
