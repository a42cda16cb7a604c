"""Is a captured model the model? Outputs, gradients, statistics and random numbers, in both modes."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture import capture


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def assert_close(actual: Any, expected: Any, what: str) -> None:
    """Equal to 1e-5 of the largest number."""
    mine, other = tensors(actual), tensors(expected)
    assert len(mine) == len(other), what
    for a, b in zip(mine, other, strict=True):
        assert a.shape == b.shape, what
        if torch.equal(a, b):
            continue
        difference = (a.double() - b.double()).abs().max()
        assert difference <= 1e-5 * max(float(b.detach().abs().max()), 1e-12), f"{what}: off by {difference}"


def assert_faithful(
    model: nn.Module, shape: Sequence[int], batches: Sequence[int] = (1, 3), *, strict: bool = True
) -> fx.GraphModule:
    """Capture at batch 2 (on the meta device: no numbers needed) and compare with the model itself.

    ``strict``: a warning, which tells of a module kept whole, counts as a failure.
    """
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        gm = capture(copy.deepcopy(model), torch.empty(2, *shape, device="meta"))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all("val" in node.meta for node in gm.graph.nodes)
    gm.load_state_dict(model.state_dict())
    assert_same_evaluation(gm, model, shape, batches)
    assert_same_training(gm, model, shape)
    return gm


def disturb(model: nn.Module) -> None:
    """Zero-initialised scales and biases hide branches: move every vector a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def assert_same_evaluation(
    gm: nn.Module, model: nn.Module, shape: Sequence[int], batches: Sequence[int]
) -> None:
    gm.eval(), model.eval()
    for batch in batches:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert_close(gm(x), model(x), f"eval at batch {batch}")


def assert_same_training(gm: nn.Module, model: nn.Module, shape: Sequence[int]) -> None:
    gm.train(), model.train()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    results = []
    for network in (model, gm):
        torch.manual_seed(1)
        out = network(x)
        results.append((out, torch.get_rng_state()))
        network.zero_grad()
        sum(tensor.square().mean() for tensor in tensors(out)).backward()
    (expected, draws), (actual, own_draws) = results
    assert type(actual) is type(expected)
    assert_close(actual, expected, "train")
    assert torch.equal(own_draws, draws), "not the same random numbers were drawn"
    gradients = dict(gm.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        own = gradients[name].grad
        assert (own is None) == (parameter.grad is None), name
        if own is not None:
            assert (own - parameter.grad).abs().max() <= 1e-5 * largest, name
    buffers = dict(gm.named_buffers())
    for name, buffer in model.named_buffers():
        assert_close(buffers[name], buffer, name)
