"""Lowering: what the kernels are, what is known of every family, what is said of the unknown."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from net_blocks import Tied
from nets import NETS
from oracle import prunable
from thinning import one_in
from torch import Tensor, fx, nn

from fxprune.capture import capture
from fxprune.graph import ChannelGraph, ir
from fxprune.lowering import lower
from fxprune.lowering.rules import RULES
from fxprune.lowering.rules.table import Context
from fxprune.paths.count import flow, reach


def graph_of(model: nn.Module, *inputs: Tensor) -> ChannelGraph:
    return lower(capture(model.eval(), inputs), strict=True)


def test_a_space_is_named_after_the_layer_that_makes_it_and_read_under_that_name() -> None:
    torch.manual_seed(0)
    model, x = NETS["mlp"]()
    kernels = list(graph_of(model, x).kernels.values())
    assert [k.in_space.size for k in kernels] == [6, 8, 8]
    assert [(a.out_space, a.out_space.size) for a in kernels[:-1]] == [
        (b.in_space, b.in_space.size) for b in kernels[1:]
    ]


def test_tied_weights_are_one_kernel_set() -> None:
    graph = graph_of(Tied(), torch.ones(2, 6))
    assert list(graph.kernels) == ["one.weight", "last.weight"]
    kernels = graph.kernels["one.weight"]
    assert kernels.aliases == ("two.weight",)
    assert kernels.uses == 2
    assert kernels.macs == 2 * 36


def test_a_module_called_twice() -> None:
    torch.manual_seed(0)
    model, x = NETS["reused"]()
    kernels = graph_of(model, x).kernels["block.weight"]
    assert kernels.uses == 2
    assert kernels.macs == (64 + 16) * 6 * 6 * 9


def test_weights_read_by_somebody_else_are_direct() -> None:
    torch.manual_seed(0)
    model, x = NETS["functional"]()
    graph = graph_of(model, x)
    assert {name: kernels.direct for name, kernels in graph.kernels.items()} == {
        "qkv.weight": True,
        "proj.weight": False,
    }


def test_prunable_counts_every_weight_once() -> None:
    torch.manual_seed(0)
    for name in ("tied", "encoder", "standard", "cross_attention"):
        model, x = NETS[name]()
        graph = lower(capture(model.eval(), x), strict=True)
        assert graph.prunable == sum(weight.numel() for weight in prunable(model).values())


def test_a_weight_that_is_never_read_has_no_kernels() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    assert list(graph_of(Idle(), torch.ones(2, 3)).kernels) == ["used.weight"]


def test_a_result_that_is_thrown_away_is_not_effective() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.wasted = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.wasted(x)
            return self.used(x)

    found = reach(graph_of(Wasteful(), torch.ones(2, 3)), {})
    assert bool(found["used.weight"].all())
    assert not any(bool(mask.any()) for name, mask in found.items() if name == "wasted.weight")


# ---------------------------------------------------------------- the unknown
class Unheard(nn.Module):
    """A function that no rule knows, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.bessel_j1(self.first(x)))


def test_an_unknown_op_is_opaque_with_a_reason() -> None:
    graph = graph_of(Unheard(), torch.ones(2, 4))
    (op,) = graph.opaque
    assert "bessel_j1" in op.reason
    assert op.node == "special_bessel_j1"


def test_an_unknown_op_never_gives_less_than_the_truth() -> None:
    """Its every input reaches its every output: a superset of the elementwise function that it is."""
    unknown = graph_of(Unheard(), torch.ones(2, 4))
    known = graph_of(nn.Sequential(*[nn.Linear(4, 4, False), nn.Linear(4, 2, False)]), torch.ones(2, 4))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        first, last = (torch.rand(s, generator=generator) < 0.4 for s in ((4, 4), (2, 4)))
        found = reach(unknown, {"first.weight": first, "last.weight": last})
        least = reach(known, {"0.weight": first, "1.weight": last})
        assert not bool((least["0.weight"] & ~found["first.weight"]).any())
        assert not bool((least["1.weight"] & ~found["last.weight"]).any())
    dead = reach(unknown, {"first.weight": torch.zeros(4, 4)})
    assert not any(bool(mask.any()) for mask in dead.values())


class Roots(torch.autograd.Function):
    """Signed square roots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_custom_autograd_function_is_a_leaf_that_lets_everything_through() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Roots.apply(self.first(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = graph_of(Custom(), torch.ones(2, 4))
    found = reach(graph, {"last.weight": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])})
    assert bool(found["first.weight"][0].all())


class Gate(nn.Module):
    """Data-dependent control flow: kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) if float(x.detach().sum()) > 0 else x


def test_a_leaf_that_cannot_be_looked_into_is_opaque() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Gate(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = graph_of(model, torch.ones(2, 4))
    (op,) = graph.opaque
    assert op.layer == "1"
    assert "1.hidden.weight" not in graph.kernels
    found = reach(graph, {"2.weight": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])})
    assert bool(found["0.weight"].all())


def test_a_rule_that_fails_makes_its_op_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that the rule wrote before are taken back; with ``strict`` its error comes through."""

    def broken_relu(context: Context, x: Any) -> Any:
        context.build.map(x, floor=True)
        raise KeyError("nobody thought\nof this")

    monkeypatch.setitem(RULES, nn.ReLU, broken_relu)
    gm = capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(2, 2))
    graph = lower(gm)
    assert [op.kind for op in graph.ops] == ["Source", "Kernel", "Opaque", "Kernel", "Sink"]
    assert "rule broken_relu raised KeyError: 'nobody thought" in graph.opaque[0].reason
    with pytest.raises(KeyError, match="nobody thought"):
        lower(gm, strict=True)


def test_errors() -> None:
    with pytest.raises(
        TypeError, match=r"gm: expected a torch.fx.GraphModule from fxprune.capture, got Linear"
    ):
        lower(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="carries no shape; capture the model"):
        lower(fx.symbolic_trace(nn.Linear(2, 2)))
    graph = graph_of(nn.Linear(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="no kernel is named 'bias'"):
        reach(graph, {"bias": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        flow(graph, {"weight": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="'spatial' or 'channel', got 'pixel'"):
        flow(graph, {}, resolution="pixel")  # type: ignore[arg-type]


def test_the_captured_network_is_not_changed() -> None:
    torch.manual_seed(0)
    model, x = NETS["norms"]()
    gm = capture(model.eval(), x)
    before, code = {name: t.clone() for name, t in gm.state_dict().items()}, gm.code
    graph = lower(gm)
    flow(graph, {})
    assert gm.code == code
    assert all(torch.equal(t, before[name]) for name, t in gm.state_dict().items())
    assert lower(gm).summary() == graph.summary()


# ---------------------------------------------------------------- families: nothing opaque
FAMILIES = {
    "test_resnet": 64, "resnext26ts": 64, "res2net50_26w_4s": 64, "test_efficientnet": 64,
    "densenet121": 64, "tf_efficientnet_b0": 65, "mobilenetv3_small_050": 64,
    "test_convnext": 64, "convnextv2_atto": 64, "regnetx_002": 64, "regnety_002": 64, "vgg11_bn": 32,
    "test_vit": 160, "deit_tiny_distilled_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224, "mixer_s32_224": 224, "test_nfnet": 64, "maxvit_pico_rw_256": 256,
}  # fmt: skip
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 32, "googlenet": 64, "efficientnet_b0": 32,
    "inception_v3": 299, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "resnet18": 32,
    "regnet_y_400mf": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32,
    "swin_t": 224, "swin_v2_t": 256, "vgg11": 32, "vit_b_32": 224, "maxvit_t": 224,
}  # fmt: skip


def assert_known(model: nn.Module, size: int) -> None:
    graph = lower(capture(model, torch.empty(2, 3, size, size, device="meta")), strict=True)
    assert [f"{op.layer}: {op.reason}" for op in graph.opaque] == []
    assert {name: kernels.shape for name, kernels in graph.kernels.items()} == {
        name: weight.shape for name, weight in prunable(model).items()
    }


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", one_in(3, FAMILIES))
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert_known(model, FAMILIES[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", one_in(3, TORCHVISION))
def test_torchvision(name: str) -> None:
    """The smallest of each family (all of them: ``benchmarks/coverage.py``)."""
    device = "cpu" if name.startswith("regnet") else "meta"  # its constructor reads numbers off its weights
    with torch.device(device):
        model = torchvision.models.get_model(name, weights=None)
    assert_known(model, TORCHVISION[name])


def test_a_view_there_and_back_is_the_parameter_itself() -> None:
    """Standardised weights go through another shape; a transposed square is another weight."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            there_and_back = self.first.weight.reshape(2, 8).view(4, 4)
            return nn.functional.linear(nn.functional.linear(x, there_and_back), self.second.weight.t())

    graph = lower(capture(Viewed(), torch.ones(1, 4)), strict=True)
    views = {op.weight.name: op.weight.view for op in graph.ops if isinstance(op, ir.Kernel)}
    assert views["first.weight"] is None
    assert views["second.weight"] is not None


def test_a_chunk_of_a_parameter_is_that_parameter() -> None:
    """Every third of a fused projection is a kernel set of the same weight."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.qkv.weight.chunk(3)
            linear = nn.functional.linear
            return linear(x, first) + linear(x, second) + linear(x, third)

    torch.manual_seed(0)
    model = Fused()
    graph = lower(capture(model, torch.ones(1, 4)), strict=True)
    weight = model.qkv.weight.detach()
    refs = [op.weight for op in graph.ops if isinstance(op, ir.Kernel)]
    assert [ref.name for ref in refs] == ["qkv.weight"] * 3
    for ref, part in zip(refs, weight.chunk(3), strict=True):
        assert torch.equal(ref.operand(lambda _: weight), part)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.tables: dict[tuple[int, ...], Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if tuple(x.shape) not in self.tables:
            self.tables[tuple(x.shape)] = self.scale * 2
        return x * self.tables[tuple(x.shape)] * self.calls


@pytest.mark.filterwarnings("ignore:capture.*kept whole")
def test_what_runs_after_the_capture_does_not_change_the_graph() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Remembers()), torch.ones(2, 4)
    gm = capture(model, x)
    before = lower(gm)
    with torch.no_grad():
        model(x)
    assert lower(gm) == before
    assert lower(pickle.loads(pickle.dumps(gm))) == before
    assert model[1].calls == 1
    assert list(model[1].tables) == [(2, 4)]


class Blank(nn.Module):
    """One branch is multiplied by zeros, which the forward makes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.dead, self.live, self.device = nn.Linear(3, 4), nn.Linear(3, 4), device

    def forward(self, x: Tensor) -> Tensor:
        y = self.dead(x)
        return y * torch.zeros(4, device=self.device) + self.live(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_zeros_are_known_where_no_tensor_has_numbers(device: str) -> None:
    graph = graph_of(Blank(device).to(device), torch.ones(2, 3, device=device))
    found = reach(graph, {})
    assert not bool(found["dead.weight"].any())
    assert bool(found["live.weight"].all())
