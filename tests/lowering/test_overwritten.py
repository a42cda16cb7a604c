"""Parameters that a forward overwrites: a mask of them would have no effect, and they are named."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.lowering import hidden_layers, matrices_outside


class Fused(nn.Module):
    """Evaluates with a weight that it computes from the one it trains with."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.fused = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "data":
            if self.training:
                y: Tensor = self.conv(x) + x
                return y
            self.fused.weight.data = (self.conv.weight.detach() + torch.eye(6)[:, :, None, None]).contiguous()
            self.fused.bias.data = self.conv.bias.data.clone()  # type: ignore[union-attr]
        elif self.way == "copy":
            with torch.no_grad():
                self.fused.weight.copy_(self.conv.weight * 2)
        else:
            self.fused.weight.data.copy_(self.conv.weight * 2)
        y = self.fused(x)
        return y


@pytest.mark.parametrize("way", ["data", "copy", "data copy"])
@pytest.mark.filterwarnings("ignore:capture. 1 .Fused. kept whole")
def test_overwritten_parameters_are_named_and_not_pruned(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Fused(way), nn.Flatten(), nn.Linear(96, 4)).eval()
    gm = fxprune.capture(model, x)
    graph = fxprune.lower(gm)
    outside = matrices_outside(gm, graph)
    assert outside == {"1.conv.weight": 324, "1.fused.weight": 324}
    assert list(hidden_layers(gm, graph)) == (["1.conv.weight"] if way == "data" else [])
    with pytest.warns(UserWarning, match="matrix weights cannot be pruned.*1.fused.weight .324."):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False).eval()
    masks = fxprune.masks(pruned)
    assert "1.fused.weight" not in masks
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    assert torch.equal(pruned(x), model(x))
    fxprune.verify(pruned)


def test_the_reason_names_what_is_overwritten() -> None:
    model = nn.Sequential(Fused("data"))
    with pytest.warns(UserWarning, match="kept whole: it overwrites 'weight' in each call"):
        gm = fxprune.capture(model, torch.randn(2, 6, 6, 6))
    (opaque,) = fxprune.lower(gm).opaque
    assert "overwrites 'weight', 'bias' in each call" in opaque.reason


class Centred(nn.Module):
    """Assigns a weight what it makes of it, with zeros that stay, or not."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.last = way, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.data
        if self.way == "norm":
            weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1)
        elif self.way == "bound":
            weight = weight.clamp(-0.1, 0.1)
        elif self.way == "mean":
            weight = weight - weight.mean(1, keepdim=True)
        else:
            weight = weight.flip(1)
        self.layer.weight.data = weight
        y: Tensor = self.last(self.layer(x).relu())
        return y


@pytest.mark.parametrize("way", ["norm", "bound", "mean", "flip"])
@pytest.mark.filterwarnings("ignore:.*cannot be pruned")
def test_assigned_weights_are_pruned_where_zeros_stay(way: str) -> None:
    torch.manual_seed(0)
    model, x = Centred(way).eval(), torch.randn(5, 6)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False).eval()
    assert ("layer.weight" in fxprune.masks(pruned)) == (way in ("norm", "bound"))
    assert torch.equal(fxprune.finalize(pruned)(x), pruned(x))


class PartWritten(nn.Module):
    """Writes in place into a part of a weight, or all of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.last = way, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        with torch.no_grad():
            if self.way == "diagonal of ones":
                weight.data.fill_diagonal_(1.0)
            elif self.way == "a row of another":
                weight[0] = weight[1] * 2
            elif self.way == "a part":
                weight.data[2:4].copy_(torch.ones(2, 8))
            elif self.way == "bounds without zero":
                weight.clamp_(0.01)
            elif self.way == "centred":
                weight.copy_(weight - weight.mean(1, keepdim=True))
            elif self.way == "diagonal of zeros":
                weight.data.fill_diagonal_(0.0)
            elif self.way == "a row of zeros":
                weight[0] = 0
            elif self.way == "bounds":
                weight.clamp_(-0.2, 0.2)
            elif self.way == "halved":
                weight.copy_(weight * 0.5)
        y: Tensor = self.last(self.layer(x).relu())
        return y


HARMLESS = ("diagonal of zeros", "a row of zeros", "bounds", "halved")
HARMFUL = ("diagonal of ones", "a row of another", "a part", "bounds without zero", "centred")


@pytest.mark.parametrize("returns", ["graph", "module"])
@pytest.mark.parametrize("way", [*HARMFUL, *HARMLESS])
@pytest.mark.filterwarnings("ignore:.*matrix weights cannot be pruned")
def test_weights_written_in_part_are_pruned_where_zeros_stay(way: str, returns: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 8), PartWritten(way).eval()
    zeroed = copy.deepcopy(model)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, returns=returns, progress=False)
    masks = fxprune.masks(pruned)
    assert ("layer.weight" in masks) == (way in HARMLESS)
    for name, mask in masks.items():
        zeroed.get_parameter(name).data.mul_(mask)
    torch.testing.assert_close(pruned(x), zeroed(x))


WRITES: dict[str, tuple[bool, Callable[[Tensor, Tensor], object]]] = {
    # By name: whether zeros stay zeros, and what is done to a weight with another tensor of its shape.
    "view of a shape": (False, lambda weight, x: weight.view_as(x).copy_(x)),
    "axis made two": (False, lambda weight, x: weight.unflatten(0, (2, 4))[0].fill_(1.0)),
    "swapped axes": (False, lambda weight, x: weight.swapaxes(0, 1)[0].fill_(1.0)),
    "flat": (False, lambda weight, x: weight.ravel()[:3].fill_(1.0)),
    "halves": (False, lambda weight, x: weight.hsplit(2)[0].fill_(1.0)),
    "strides": (False, lambda weight, x: weight.as_strided((8,), (9,)).fill_(1.0)),
    "windows": (False, lambda weight, x: weight.unfold(0, 2, 2).add_(1.0)),
    "float as asked": (False, lambda weight, x: weight.float().add_(1.0)),
    "contiguous as it is": (False, lambda weight, x: weight.contiguous().add_(1.0)),
    "transposed into itself": (False, lambda weight, x: weight.t().copy_(weight * 1.0)),
    "result of another": (False, lambda weight, x: torch.mul(x, x, out=weight.data)),
    "bound above": (False, lambda weight, x: weight.clamp_max_(-1.0)),
    "named term": (False, lambda weight, x: weight.sub_(other=x)),
    "another type": (True, lambda weight, x: weight.double().add_(1.0)),
    "copy": (True, lambda weight, x: weight.t().contiguous().add_(1.0)),
    "decay": (True, lambda weight, x: weight.sub_(0.1 * weight)),
    "bound below": (True, lambda weight, x: weight.clamp_min_(-0.1)),
    "row of a view": (True, lambda weight, x: weight.t()[0].mul_(0.5)),
    "result of itself": (True, lambda weight, x: torch.abs(weight.data, out=weight.data)),
    "division": (True, lambda weight, x: weight.div_(weight.norm(dim=1, keepdim=True).clamp(min=1e-6))),
}


class Writes(nn.Module):
    """Writes into a weight before it uses it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.write = WRITES[way][1]
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("other", torch.rand(8, 8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.layer.weight, self.other)
        y: Tensor = self.last(self.layer(x).relu())
        return y


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.filterwarnings("ignore:.*matrix weights cannot be pruned")
def test_writes_through_any_view_are_seen_and_harmless_ones_verify(way: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 8), Writes(way).eval()
    zeroed = copy.deepcopy(model)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    masks = fxprune.masks(pruned)
    assert ("layer.weight" in masks) == WRITES[way][0]
    for name, mask in masks.items():
        zeroed.get_parameter(name).data.mul_(mask)
    for _ in range(2):
        torch.testing.assert_close(pruned(x), zeroed(x))
    fxprune.verify(pruned)


class CountsItself(PartWritten):
    """Cannot be captured: its code reads numbers."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum().abs() > 0) + 1):
            x = x * 1.0
        return super().forward(x)


@pytest.mark.parametrize("way", ["diagonal of ones", "bounds"])
def test_weights_written_in_part_without_a_graph(way: str) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="pruned without a graph"):
        pruned = fxprune.apply(
            CountsItself(way),
            "magnitude",
            0.5,
            example_inputs=torch.randn(4, 8),
            returns="module",
            progress=False,
        )
    assert ("layer.weight" in fxprune.masks(pruned)) == (way == "bounds")
