"""Norms of inputs of weights that read nothing, in part or as a whole."""

import re
from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import Tensor, nn
from torch.nn.functional import linear, relu

import fxprune
from fxprune.scoring import inputs
from fxprune.scoring.data import Batch
from fxprune.scoring.gradients import masked


def norms_of(model: nn.Module, x: Tensor) -> inputs.InputNorms:
    asked = problem(model.eval(), 0.5, data=(x, torch.zeros(len(x))))
    return inputs.input_norms(asked, masked(asked, asked.masks), [Batch(x, None)], "wanda")


def pruned(model: nn.Module, x: Tensor, unseen: str) -> dict[str, Tensor]:
    given: dict[str, Any] = {"example_inputs": x, "data": (x, torch.zeros(len(x))), "progress": False}
    said = f"no inputs are seen of {unseen}; they are ranked by magnitude"
    with pytest.warns(UserWarning, match=re.escape(said)):
        return fxprune.masks(fxprune.apply(model.eval(), "wanda", 0.5, compare="layer", **given))


def keeps_the_largest(mask: Tensor, weight: Tensor) -> bool:
    size = weight.detach().abs()
    return bool(mask.any()) and bool(size[mask].min() > size[~mask].max())


class Silent(nn.Module):
    """A convolution that reads nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(relu(self.a(x) - 100))
        return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_without_inputs_is_ranked_by_magnitude(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Silent().to(memory_format=layout)
    mask = pruned(model, torch.rand(4, 3, 6, 6), "b.weight")["b.weight"]
    assert keeps_the_largest(mask, model.b.weight)


def test_a_weight_that_is_read_in_two_ways_without_inputs_is_ranked_by_magnitude() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = relu(x - 100)
            found: Tensor = self.last(linear(h, self.w) + linear(h, self.w.t()) + x)
            return found

    torch.manual_seed(0)
    model = Tied()
    assert keeps_the_largest(pruned(model, torch.rand(5, 6), "w")["w"], model.w)


class Attention(nn.Module):
    """Keys and values are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, 0 * x, 0 * x, need_weights=False)[0]
        return found


def test_parts_of_a_packed_projection_without_inputs_have_the_mean_of_the_others() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 5, 8)
    x[..., 2] = 0
    mask = pruned(model, x, "inner.in_proj_weight[8:24], inner.out_proj.weight")["inner.in_proj_weight"]
    weight = model.inner.in_proj_weight
    assert keeps_the_largest(mask[8:], weight[8:])
    assert not mask[:8, 2].any()  # a single input that is always zero is no matrix
    with pytest.warns(UserWarning, match="no inputs are seen"):
        norms = norms_of(model, x).of("inner.in_proj_weight")
    own = x.flatten(0, 1).norm(dim=0)
    assert torch.allclose(norms[:8], own.expand(8, 8))
    assert torch.allclose(norms[8:], own.square().mean().sqrt().expand(16, 8))


def test_rows_that_no_product_shows_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.w[:4]) + linear(x, 2 * self.w[4:])

    torch.manual_seed(0)
    model = Half()
    assert keeps_the_largest(pruned(model, torch.rand(5, 6), "w[4:8]")["w"][4:], model.w[4:])


def test_an_input_channel_of_a_transposed_convolution_may_be_always_zero() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose1d(4, 3, 2)), torch.rand(5, 4, 6)
    x[:, 1] = 0
    norms = norms_of(model, x).of("0.weight")
    assert torch.allclose(norms, x.square().sum((0, 2)).sqrt().view(4, 1, 1).expand(4, 3, 2))


def test_zeros_of_a_process_that_saw_nothing_lie_on_the_device_of_the_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = (0, (4, 3), (3, 1), 1)
    other = {("w", place): ((4, 1), "torch.float32")}
    monkeypatch.setattr(inputs, "gathered", lambda own, group: [own, other])
    monkeypatch.setattr(inputs, "average", lambda tensors, group: None)
    found = inputs._averaged({}, None, torch.device("meta"))  # type: ignore[arg-type]
    assert found["w"][place].device.type == "meta"
