"""Weights that a network joins to one operand: each of them is pruned by itself."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.rewrite import put_masks


class Net(nn.Module):
    """Weights of the same form and of another one, used as ``work`` says."""

    def __init__(self, work: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.work = work
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.c, self.out = nn.Parameter(torch.randn(2, 8)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self, x)


Work = Callable[[Net, Tensor], Tensor]
SAME: dict[str, tuple[Work, Work]] = {
    "fused": (
        lambda m, x: F.linear(x, torch.cat([m.a, m.b, m.c]))[..., :10:2][..., :4] @ m.out.weight.T,
        lambda m, x: torch.cat([x @ w.T for w in (m.a, m.b, m.c)], -1)[..., :10:2][..., :4] @ m.out.weight.T,
    ),
    "added": (
        lambda m, x: m.out(torch.cat([x, x.flip(-1)], -1) @ torch.cat([m.a, m.b], 1).t()),
        lambda m, x: m.out(x @ m.a.t() + x.flip(-1) @ m.b.t()),
    ),
    "stacked": (
        lambda m, x: m.out(torch.bmm(x[None].expand(2, -1, -1), torch.stack([m.a, m.b]).mT).sum(0)),
        lambda m, x: m.out(x @ m.a.t() + x @ m.b.t()),
    ),
    "with a constant": (
        lambda m, x: m.out(F.linear(x, torch.stack([m.a, m.b, torch.ones(4, 8)]).permute(1, 0, 2)[:, 1])),
        lambda m, x: m.out(F.linear(x, m.b)),
    ),
    "einsum": (
        lambda m, x: m.out(torch.einsum("ni,koi->no", x, torch.stack((m.a, m.b)))),
        lambda m, x: m.out(x @ m.a.t() + x @ m.b.t()),
    ),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SAME)
def test_paths_are_those_of_products_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    joined, single = (Net(work) for work in SAME[name])
    single.load_state_dict(joined.state_dict())
    assert torch.allclose(joined(x), single(x), atol=1e-5)
    one, other = (fxprune.capture(net, x) for net in (joined, single))
    graph = fxprune.lower(one)
    assert not graph.opaque
    assert set(graph.kernels) == set(fxprune.lower(other).kernels)
    masks = {kernel: torch.rand(graph.kernels[kernel].shape) < 0.3 for kernel in graph.kernels}
    for network in (one, other):
        put_masks(network, masks)
    mine, plain = fxprune.analyze(one), fxprune.analyze(other)
    assert mine.log_paths == pytest.approx(plain.log_paths)
    assert all(torch.equal(mask, plain.effective[kernel]) for kernel, mask in mine.effective.items())


def test_joined_weights_are_pruned_and_train() -> None:
    torch.manual_seed(0)
    net, x = Net(SAME["fused"][0]), torch.randn(5, 8)
    pruned = fxprune.apply(
        net, "snip", 0.8, example_inputs=x, data=(x, torch.randint(3, (5,))), progress=False
    )
    assert set(fxprune.masks(pruned)) == {"a", "b", "c", "out.weight"}
    pruned(x).sum().backward()
    torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9).step()
    fxprune.verify(pruned)
