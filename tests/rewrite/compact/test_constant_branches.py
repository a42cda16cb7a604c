"""Branches that give the same numbers for every input become constants, and the network computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune


def _stirred(net: nn.Module) -> nn.Module:
    """Give norms numbers of their own, so that constants matter."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(generator=generator)
    return net.eval()


class Net(nn.Module):
    """A shortcut, a gate and an attention, each of which may die."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.short_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.norm(self.conv(x)) + self.short_norm(self.shortcut(x))).relu()
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = self.head(x.mean(1))
        return out


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return _stirred(Net())


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _cleared(net: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).zero_()
    return net


def _names(net: nn.Module) -> set[str]:
    return {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize(
    ("dead", "gone", "new"),
    [
        ("shortcut.weight", {"shortcut.weight", "shortcut.bias", "short_norm.weight", "short_norm.bias"}, 0),
        ("gate.weight", {"gate.weight", "gate.bias"}, 1),
        ("proj.weight", {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}, 1),
    ],
)
def test_a_dead_branch_is_gone(net: nn.Module, dead: str, gone: set[str], new: int) -> None:
    before = _names(net)
    expected = _cleared(net, dead)(X)
    small = fxprune.compact(net, X)
    assert torch.allclose(small(X), expected, atol=1e-6)
    assert before - _names(small) == gone
    constants = _names(small) - before
    assert len(constants) == new
    assert all(small.get_parameter(name).numel() == 8 for name in constants)
    called = {str(node.target) for node in small.graph.nodes if node.op == "call_module"}
    assert not called & {name.rpartition(".")[0] for name in gone}
    layer = next(row for row in small.meta["fxprune"]["compaction"].layers if row.name == dead)
    assert (layer.outputs[1], layer.inputs[1], layer.weights[1], layer.macs[1]) == (0, 0, 0, 0)
    assert layer.given_back == 0


def test_the_constant_of_a_sum_goes_into_the_bias_of_the_other_side(net: nn.Module) -> None:
    _cleared(net, "shortcut.weight")
    small = fxprune.compact(net, X)
    constant = net.get_submodule("short_norm")(net.get_parameter("shortcut.bias").view(1, 8, 1, 1)).flatten()
    moved = small.get_parameter("norm.bias") - net.get_parameter("norm.bias")
    assert torch.allclose(moved, constant, atol=1e-6)
    assert not any(node.target in (torch.add, "add") for node in small.graph.nodes)


def test_sizes_of_live_values_only_shape_a_constant() -> None:
    """Attention over equal values is a constant, whatever the batch is."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            q, k, v = self.qkv(x).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
            out: torch.Tensor = self.head(x + self.proj(mixed))
            return out

    torch.manual_seed(0)
    net, x = _cleared(Attention(), "qkv.weight"), torch.randn(2, 5, 8)
    small = fxprune.compact(net, x)
    assert {name.partition(".")[0] for name in _names(small)} == {"constant_of_proj", "head"}
    other = torch.randn(3, 7, 8)
    assert torch.allclose(small(other), net(other), atol=1e-6)


def test_small_differences_in_half_precision_are_no_rounding() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.table = nn.Parameter(1 + torch.linspace(0, 0.02, 5)[:, None].expand(5, 4).clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(x + self.a(x) * 0 + self.table * (self.a(x) + 1))
            return out

    torch.manual_seed(0)
    net, x = _cleared(Table(), "a.weight", "a.bias").bfloat16(), torch.randn(2, 5, 4).bfloat16()
    small = fxprune.compact(net, x, verify=False)
    assert torch.equal(small(x), net(x))


def test_a_constant_keeps_the_batch_that_it_gives_its_sum() -> None:
    """A mean over the batch is one sample; with the branch beside it, the sum has as many as the batch."""

    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.a(x) + self.b(x).mean(0, keepdim=True))
            return out

    torch.manual_seed(0)
    net = _cleared(Centre(), "a.weight")
    small = fxprune.compact(net, torch.randn(1, 4))
    x = torch.randn(3, 4)
    assert small(x).shape == (3, 2)
    assert torch.allclose(small(x), net(x), atol=1e-6)


class Activated(nn.BatchNorm2d):
    """A norm that ends in an activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_constant_does_not_move_before_an_activation() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), Activated(6)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.norm(self.a(x)) + self.b(x))
            return out

    torch.manual_seed(0)
    net = _cleared(_stirred(Two()), "b.weight")
    small = fxprune.compact(net, X)
    assert torch.allclose(small(X), net(X), atol=1e-6)
    assert "b.weight" not in _names(small)


def test_a_constant_that_changes_over_the_image_stays() -> None:
    """A border of zeros around a constant makes other numbers there."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.a(x) + self.c(self.b(x))
            return out

    torch.manual_seed(0)
    net = _cleared(Deep(), "b.weight")
    small = fxprune.compact(net, X)
    assert torch.allclose(small(X), net(X), atol=1e-6)
    larger = torch.randn(1, 3, 11, 9)
    assert torch.allclose(small(larger), net(larger), atol=1e-6)


def test_what_is_written_into_is_no_constant() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y[:, 0] = x[:, 1]
            out: torch.Tensor = self.b(x) + y
            return out

    torch.manual_seed(0)
    net, x = _cleared(Written(), "a.weight"), torch.randn(3, 4)
    small = fxprune.compact(net, x)
    assert torch.allclose(small(x), net(x), atol=1e-6)


def test_zeros_that_no_mask_holds_may_grow(net: nn.Module) -> None:
    """A layer that begins at zero is no dead branch, where masks say what is pruned."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    masks["conv.weight"][:, :4] = False
    _cleared(net, "proj.weight")
    gm = fxprune.capture(net, X)
    fxprune.set_masks(gm, masks)
    assert {"proj.weight", "qkv.weight"} <= _names(fxprune.compact(gm, X))
    masks["proj.weight"][:] = False
    fxprune.set_masks(gm, masks)
    small = fxprune.compact(gm, X)
    assert not {"proj.weight", "qkv.weight"} & _names(small)
    assert torch.allclose(small(X), gm.eval()(X), atol=1e-6)


def test_constants_stay_in_place_without_folding(net: nn.Module) -> None:
    _cleared(net, "gate.weight")
    small = fxprune.compact(net, X, fold_constants=False)
    assert "gate.weight" in _names(small)
    assert torch.allclose(small(X), net(X), atol=1e-6)


def test_it_is_saved_loaded_and_compacted_again(net: nn.Module, tmp_path: Path) -> None:
    _cleared(net, "shortcut.weight", "gate.weight", "proj.weight")
    small = fxprune.compact(net, X)
    fxprune.save(small, tmp_path / "small.safetensors")
    torch.manual_seed(5)
    loaded = fxprune.load(tmp_path / "small.safetensors", Net(), example_inputs=X)
    assert torch.equal(loaded.eval()(X), small(X))
    assert _names(loaded) == _names(small)
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias"):
            loaded.get_parameter(name)[:3] = 0
    again = fxprune.compact(loaded, X)
    assert again.get_parameter("conv.weight").shape == (8, 5, 3, 3)
    assert torch.allclose(again(X), loaded(X), atol=1e-6)


def test_what_took_the_place_of_a_branch_is_trained(net: nn.Module) -> None:
    adam = torch.optim.Adam(net.parameters())
    small = fxprune.compact(_cleared(net, "gate.weight"), X)
    moved = fxprune.remap_optimizer(adam, net, small)
    owned = {id(parameter) for group in moved.param_groups for parameter in group["params"]}
    assert owned == {id(parameter) for parameter in small.parameters()}
    constant = next(name for name in _names(small) if name not in _names(net))
    before = small.get_parameter(constant).detach().clone()
    small.train()(X).square().sum().backward()
    moved.step()
    assert not torch.equal(before, small.get_parameter(constant))


@pytest.mark.parametrize("frozen", [False, True])
def test_what_took_the_place_of_a_frozen_branch_is_frozen(net: nn.Module, frozen: bool) -> None:
    """The rest of the network is as it was, the first of its layers frozen or not."""
    net.get_submodule("gate").requires_grad_(not frozen)
    net.get_submodule("stem").requires_grad_(frozen)
    small = fxprune.compact(_cleared(net, "gate.weight"), X)
    (constant,) = _names(small) - _names(net)
    assert small.get_parameter(constant).requires_grad is not frozen


def test_a_pruner_goes_on_without_the_branch(net: nn.Module) -> None:
    pruner = fxprune.Pruner(net, "gmp", 0.5, total=2, example_inputs=X)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    masks["shortcut.weight"][:] = False
    fxprune.set_masks(pruner.model, masks)
    sgd = torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9)
    expected = pruner.model.eval()(X)
    small = pruner.compact(sgd)
    assert torch.allclose(small.eval()(X), expected, atol=1e-6)
    assert "shortcut.weight" not in pruner.masks
    pruner.step(2)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


class Written(nn.Module):
    """A dead layer, whose memory a live value is written into through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, live = self.dead(x), self.live(x)
        view = y.view(-1, 6)
        view -= live
        out: torch.Tensor = self.head(y + live.tanh())
        return out


class BiasIsRead(Written):
    """The live layer's bias, which could take up the constant, is an output as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = self.head((self.live(x) + self.dead(x)).relu())
        return torch.cat([sums, self.live.bias.expand(x.shape[0], -1)], 1)


class WeightIsRead(Written):
    """The branch reads the dead weight by itself, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.dead.weight.sum(1) + self.dead(x))
        out: torch.Tensor = self.head(self.live(x).relu() * gate)
        return out


class Scalar(Written):
    """A number without axes meets a live value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.live(x) + self.dead(x)) + self.live.bias.sum()
        return out


@pytest.mark.parametrize("kind", [Written, BiasIsRead, WeightIsRead, Scalar])
def test_what_reads_or_writes_beside_the_branch(kind: type[Written]) -> None:
    torch.manual_seed(0)
    net, x = _cleared(kind().eval(), "dead.weight"), torch.randn(5, 4)
    small = fxprune.compact(net, x, verify=False)
    assert torch.allclose(small(x), net(x), atol=1e-6)
