"""Parameters that a forward overwrites: a mask of them would have no effect, and they are named."""

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
