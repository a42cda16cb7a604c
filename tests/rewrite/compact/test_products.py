"""Removed channels of products and sums that hold numbers although no path reaches them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxprune


class Block(nn.Module):
    """Attention of two heads behind a layer norm, with biases everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.norm(y)
        q, k, v = (layer(z).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.last(y + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class Summed(nn.Module):
    """A sum over channels, some of which hold a bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).sum(-1, keepdim=True))


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_masks_without_structure_on_attention_behind_a_norm(sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Block().eval(), torch.randn(3, 5, 6)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.1, 1.0)
    pruned = fxprune.apply(
        model, "random", sparsity, example_inputs=x, progress=False, on_collapse="repair", seed=seed
    )
    small = fxprune.compact(pruned, x)
    with torch.no_grad():
        new = torch.randn(4, 7, 6)
        assert torch.allclose(small(new), pruned(new), atol=1e-5)


def test_a_sum_over_channels_keeps_their_biases() -> None:
    torch.manual_seed(0)
    model, x = Summed().eval(), torch.randn(3, 4)
    with torch.no_grad():
        model.one.weight[:3].zero_()
    small = fxprune.compact(model, x)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-6)
        model.one.bias[:3].zero_()
    assert fxprune.compact(model, x).get_parameter("one.weight").shape == (5, 4)
