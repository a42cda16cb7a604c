"""Weights that reach a product as a copy have the inputs that the same weights in plain layers have."""

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.scoring.copies import Copies, Layout, places_in
from fxprune.scoring.moments import Products

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


class Spread(nn.Module):
    """Multiplies every sample by a copy of its own of one matrix."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.way = nn.Parameter(torch.randn(INPUTS, 4)), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "plain":
            return x @ self.weight
        each = self.weight.expand(len(x), INPUTS, 4).contiguous()
        if self.way == "right":
            return torch.bmm(x[:, None], each)[:, 0]
        return torch.bmm(each.mT, x[:, :, None])[:, :, 0]


@pytest.mark.parametrize("way", ["right", "left"])
@pytest.mark.filterwarnings("error:.*seen.*")
def test_a_copy_for_every_sample_has_the_inputs_of_all(way: str) -> None:
    x = torch.cat([rows(), rows()[:1].flip(1) * 3])
    found, expected = (
        fxprune.apply(Spread(one), "wanda", 0.5, data=x, progress=False) for one in (way, "plain")
    )
    assert torch.equal(fxprune.masks(found)["weight"], fxprune.masks(expected)["weight"])


@pytest.mark.parametrize("way", ["right", "left"])
def test_copies_for_every_sample_are_one_matrix(way: str) -> None:
    model, x, seen = Spread(way), rows(), []
    weight = model.weight.detach()
    with torch.no_grad(), Products({"weight": model.weight}, lambda *found: seen.append(found)):
        model(x)
    ((name, geometry, inputs),) = seen
    assert name == "weight"
    assert torch.equal(weight.flatten()[geometry.positions(weight)], weight[None])
    assert torch.equal(inputs()[0], x[None])


def test_a_copy_that_is_written_to_is_none() -> None:
    weight = torch.randn(3, 4)
    copies = Copies({"weight": weight})
    copied = weight.clone()
    copies.note(torch.ops.aten.clone.default, [weight], copied)
    copies.note(torch.ops.aten.add_.Tensor, [torch.zeros(3, 4), copied], None)
    assert copies.origin(copied) is not None
    copies.note(torch.ops.aten.mul_.Tensor, [copied.view(-1), weight], copied)
    assert copies.origin(copied) is None
