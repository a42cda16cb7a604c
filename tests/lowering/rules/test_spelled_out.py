"""Products and windows in unusual forms have the paths of the same nets spelled out."""

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.rewrite import put_masks


class Capsules(nn.Module):
    """A matrix for each pair of an input capsule and an output capsule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 6, 3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x[:, :, None, :, None]).squeeze(-1).sum(1)


class Spelled(Capsules):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("icod,bid->bco", self.weight[0], x)


class Routed(nn.Module):
    """The other usual order: output capsules first, data broadcast along them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x[None, :, :, None, :] @ self.weight[:, None]).sum(2).squeeze(2).movedim(0, 1)


class RoutedSpelled(Routed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("cido,bid->bco", self.weight, x)


@pytest.mark.parametrize(("kind", "spelled"), [(Capsules, Spelled), (Routed, RoutedSpelled)])
def test_paths_are_those_of_the_sum_spelled_out(kind: type[nn.Module], spelled: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, other, x = kind(), spelled(), torch.randn(2, 6, 4)
    other.load_state_dict(net.state_dict())
    assert torch.allclose(net(x), other(x), atol=1e-5)
    mask = torch.rand(net.get_parameter("weight").shape) < 0.3
    reports = []
    for model in (net, other):
        gm = fxprune.capture(model, x)
        graph = fxprune.lower(gm, strict=True)
        assert list(graph.kernels) == ["weight"]
        assert not graph.opaque
        put_masks(gm, {"weight": mask})
        reports.append(fxprune.analyze(gm))
    assert reports[0].log_paths == pytest.approx(reports[1].log_paths)
    assert torch.equal(reports[0].effective["weight"], reports[1].effective["weight"])


class Windows(nn.Module):
    """Overlapping windows of a sequence whose memory has the batch last, as in Longformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def windows(self, x: Tensor) -> Tensor:
        steps, channels, batch = x.stride(1), x.stride(2), x.stride(0)
        return x.as_strided((x.shape[0], 3, 4, 6), (batch, 2 * steps, steps, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.windows(self.layer(x).transpose(0, 1)))
        return out


class Unfolded(Windows):
    def windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, 4, 2).transpose(2, 3)


@pytest.mark.filterwarnings("ignore:capture")
def test_windows_of_memory_in_another_order_are_those_of_unfold() -> None:
    torch.manual_seed(0)
    net, other, x = Windows(), Unfolded(), torch.randn(8, 2, 4)
    other.load_state_dict(net.state_dict())
    assert torch.allclose(net(x), other(x), atol=1e-6)
    masks = {"layer.weight": torch.rand(6, 4) < 0.3, "out.weight": torch.rand(2, 6) < 0.3}
    reports = []
    for model in (net, other):
        gm = fxprune.capture(model, x)
        assert not fxprune.lower(gm, strict=True).opaque
        put_masks(gm, masks)
        reports.append(fxprune.analyze(gm))
    assert reports[0].log_paths == pytest.approx(reports[1].log_paths)
    assert all(torch.equal(mask, reports[1].effective[name]) for name, mask in reports[0].effective.items())
