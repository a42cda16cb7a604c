"""Functions of a whole matrix or signal: no op is opaque, exact outputs stay, also with fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach

Work = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.a, self.b, self.work = nn.Linear(8, 12), nn.Linear(12, 5), work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self, x)


def _gram(net: Net, x: Tensor) -> Tensor:
    h: Tensor = net.a(x)
    return h @ h.mT + 9 * torch.eye(6)


def _spectrum(net: Net, x: Tensor) -> Tensor:
    window = torch.hann_window(8)
    found = torch.stft(net.a(x).flatten(1), 8, 4, window=window, return_complex=True)
    return torch.istft(found * 0.5, 8, 4, window=window)


def _written(net: Net, x: Tensor) -> Tensor:
    h = net.a(x).clone()
    h[h < 0] = 0
    result: Tensor = net.b(h)
    return result


def _put(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    h = h.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.ones(()))
    h = h.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), h[:2, 0], accumulate=True)
    result: Tensor = net.b(h.masked_scatter(h[..., :1] < 0, h.abs()))
    return result


def _bag(net: Net, x: Tensor) -> Tensor:
    found = F.embedding_bag(x.argmax(-1), torch.ones(8, 12))
    result: Tensor = F.linear(found, net.b.weight) + net.a(x)[:, 0, :5]
    return result


def _broadcast(net: Net, x: Tensor) -> Tensor:
    both: Any = vars(torch)["broadcast_tensors"]
    return torch.stack(both(net.b(net.a(x)), x[..., :1]))


WORKS: dict[str, Work] = {
    "determinant": lambda net, x: torch.linalg.det(net.a(x)[..., :6]),
    "inverse": lambda net, x: torch.linalg.inv(net.a(x)[..., :6] + 9 * torch.eye(6)) @ net.b(net.a(x)),
    "solve": lambda net, x: torch.linalg.solve(net.a(x)[..., :6] + 9 * torch.eye(6), net.b(net.a(x))),
    "singular values": lambda net, x: torch.linalg.svdvals(net.a(x)),
    "factors": lambda net, x: torch.linalg.qr(net.a(x))[0] @ net.b.weight[:, :6].t(),
    "cholesky": lambda net, x: torch.linalg.cholesky(_gram(net, x)),
    "cross product": lambda net, x: torch.cross(net.a(x)[..., :3], net.b(net.a(x))[..., :3], dim=-1),
    "spectrum": _spectrum,
    "written by a mask of itself": _written,
    "written at places": _put,
    "embedding bag": _bag,
    "broadcast": _broadcast,
}


@pytest.mark.parametrize("name", WORKS)
def test_every_op_is_known_and_outputs_are_equal(name: str) -> None:
    torch.manual_seed(0)
    model = Net(WORKS[name])
    gm = capture(model, torch.randn(2, 6, 8))
    x = torch.randn(3, 6, 8)
    assert torch.equal(gm(x), model(x))
    graph = lower(gm, strict=True)
    assert not graph.opaque
    live = {key for key, mask in reach(graph, {}).items() if bool(mask.any())}
    model(x).abs().sum().backward()
    used = {
        key for key, p in model.named_parameters() if p.dim() == 2 and p.grad is not None and p.grad.any()
    }
    assert live == used & live  # no path where there is no gradient
    assert used <= live | {"b.weight"}


@pytest.mark.parametrize("name", ["determinant", "inverse", "solve", "cholesky", "cross product"])
def test_channels_that_go_leave_outputs_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    pruned = fxprune.apply(
        Net(WORKS[name]), "magnitude", 0.2, granularity="channel", example_inputs=x, progress=False
    ).eval()
    torch.testing.assert_close(fxprune.compact(pruned)(x), pruned(x))


@pytest.mark.parametrize("name", ["spectrum", "singular values", "factors"])
def test_what_mixes_features_keeps_all_of_them(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="must stay"):
        fxprune.apply(
            Net(WORKS[name]), "magnitude", 0.2, granularity="channel", example_inputs=torch.randn(2, 6, 8)
        )
