"""Weights that reach a product as a copy have the inputs that the same weights in plain layers have."""

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.scoring.copies import Copies, Layout, places_in

EXPERTS, INPUTS, HIDDEN, OUTPUTS = 3, 6, 5, 4


class ByEinsum(nn.Module):
    """Experts in one parameter, which einsum lays out anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(EXPERTS, INPUTS, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        return torch.einsum("beh,eho->beo", hidden, self.down).sum(1)


class ByLayer(nn.Module):
    """The same, the first weights as one layer."""

    def __init__(self, other: ByEinsum) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, EXPERTS * HIDDEN, bias=False), other.down
        with torch.no_grad():
            self.up.weight.copy_(other.up.transpose(1, 2).reshape(-1, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu().unflatten(1, (EXPERTS, HIDDEN))
        return torch.einsum("beh,eho->beo", hidden, self.down).sum(1)


class Cast(nn.Module):
    """A layer that makes another type of its weight, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.weight.t().contiguous().double().t()).float()


def rows() -> Tensor:
    drawn = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(1))
    return drawn * torch.arange(1, INPUTS + 1)


def weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The first as a matrix (outputs, inputs), the second as it is."""
    up = model.get_parameter("up") if isinstance(model.up, nn.Parameter) else None
    rows = model.get_parameter("up.weight") if up is None else up.transpose(1, 2).reshape(-1, INPUTS)
    return rows, model.get_parameter("down")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "obc", "dsnot"])
@pytest.mark.filterwarnings("error:.*seen.*")
def test_a_weight_that_einsum_lays_out_anew_is_solved_as_a_layer(method: str) -> None:
    model, x = ByEinsum(), rows()
    plain = ByLayer(model)
    assert torch.allclose(model(x), plain(x), atol=1e-4)
    found, expected = (
        fxprune.apply(one, method, 0.5, data=x, budget={"*": 0.5}, progress=False) for one in (model, plain)
    )
    for own, other in zip(weights(found), weights(expected), strict=True):
        assert torch.allclose(own, other, atol=1e-4)
    fitted, wanted = (
        fxprune.reconstruct(one, x, dense, progress=False)
        for one, dense in ((found, model), (expected, plain))
    )
    for own, other in zip(weights(fitted), weights(wanted), strict=True):
        assert torch.allclose(own, other, atol=1e-4)


@pytest.mark.filterwarnings("error:.*seen.*")
def test_a_copy_of_a_copy() -> None:
    model, x = Cast(), rows()
    found = fxprune.apply(model, "wanda", 0.5, data=x, progress=False)
    scores = model.weight.detach().abs() * x.norm(dim=0)
    assert torch.equal(fxprune.masks(found)["weight"], scores > scores.sort(1).values[:, 2:3])


def test_memory_that_is_used_again_is_no_copy() -> None:
    weight = torch.randn(3, 4)
    copies = Copies({"weight": weight})
    copied = weight.t().contiguous()
    copies.note(torch.ops.aten.clone.default, [weight.t()], copied)
    origin = copies.origin(copied[1:])
    assert origin is not None
    assert origin[0] == "weight"
    places = places_in(weight, origin[1], Layout.of(copied[1:]))
    assert torch.equal(weight.flatten()[places], copied[1:])
    assert copies.origin(torch.zeros(3)) is None
    del copied
    other = torch.zeros(4, 3)
    copies.copies[other.untyped_storage().data_ptr()] = copies.copies.popitem()[1]  # as if it lay there
    assert copies.origin(other) is None
