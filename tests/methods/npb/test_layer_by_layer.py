"""Paths that come in, layer by layer, against the eager network."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.methods.npb.layer_by_layer import decide
from methods.npb.networks import asked


@pytest.mark.parametrize("net", ["conv_chain", "residual", "projection", "dense", "strided", "transposed"])
def test_incoming_paths_are_those_of_the_eager_network(net: str) -> None:
    model, inputs, question = asked(net, 0.5)
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in question.weights.items()}
    seen: dict[str, torch.Tensor] = {}

    def choose(name: str, incoming: torch.Tensor) -> torch.Tensor:
        seen[name] = incoming
        return masks[name]

    decide(question.graph, choose)
    eager = copy.deepcopy(model).double().eval()
    arriving: dict[str, torch.Tensor] = {}
    for path, module in eager.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        if f"{path}.weight" in masks:
            module.weight.data.copy_(masks[f"{path}.weight"])
            if module.bias is not None:
                module.bias.data.zero_()

            def hook(_: nn.Module, args: Any, path: str = path) -> None:
                arriving[f"{path}.weight"] = args[0][0].sum(dim=tuple(range(1, args[0].dim() - 1)))

            module.register_forward_pre_hook(hook)
    eager(torch.ones_like(inputs, dtype=torch.float64))
    assert seen.keys() == masks.keys() == arriving.keys()
    for name, incoming in seen.items():
        per_input = incoming if question.graph.kernels[name].transposed else incoming.transpose(0, 1)
        groups = question.graph.kernels[name].groups
        found = per_input.flatten(1)[:, 0] if groups == 1 else None
        if found is not None:
            expected = arriving[name] / arriving[name].max()
            assert torch.allclose(found, expected, atol=1e-12), name


def test_grouped_layers_and_views_get_the_paths_of_their_own_inputs() -> None:
    _, _, question = asked("depthwise", 0.0)
    seen: dict[str, torch.Tensor] = {}
    first = next(iter(question.weights))
    only_one = torch.zeros_like(question.weights[first], dtype=torch.bool)
    only_one[1] = True

    def choose(name: str, incoming: torch.Tensor) -> torch.Tensor:
        seen[name] = incoming
        return only_one if name == first else torch.ones_like(incoming)

    decide(question.graph, choose)
    depthwise = next(n for n, k in question.graph.kernels.items() if k.groups > 1)
    assert seen[depthwise].flatten(1)[:, 0].nonzero().flatten().tolist() == [1]
