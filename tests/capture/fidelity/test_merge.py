"""Training and evaluation from one graph."""

import copy
import operator
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from capture.faithful import assert_faithful
from fxprune import apply, masks
from fxprune.capture import ModeSwitch, capture


def kinds(gm: nn.Module) -> list[str]:
    return [type(gm.get_submodule(n.target)).__name__ for n in gm.graph.nodes if n.op == "call_module"]


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.5, training=self.training)
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3 if self.training else 0.0)[:, 0]


def test_constants_that_depend_on_the_mode_are_switched() -> None:
    gm = assert_faithful(nn.Sequential(FunctionalDropout(), nn.Linear(4, 2)), (4,))
    assert kinds(gm) == ["Linear", "ModeSwitch", "ModeSwitch", "Linear"]
    assert len([m for m in gm.modules() if isinstance(m, ModeSwitch)]) == 1


def test_switches_follow_the_flag_of_their_module() -> None:
    model = nn.Sequential(FunctionalDropout(), nn.Linear(4, 2)).train()
    model[0].eval()
    gm = capture(model, torch.empty(2, 4))
    x = torch.ones(2, 4)
    assert gm.training
    assert torch.equal(gm(x), model(x))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], 1).bernoulli_(0.5)
        return x * keep / 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc(x)) * x.shape[0]


def test_the_innermost_module_that_depends_on_the_mode_stays_whole() -> None:
    gm = assert_faithful(nn.Sequential(Block(), Block()), (4,))
    assert kinds(gm) == ["Linear", "DropPath"] * 2


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.aux_norm, self.aux = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x))
        extra = self.aux(F.relu(self.aux_norm(x), inplace=True)) if self.training else None
        x = self.head(x)
        return (x, extra) if self.training else x


def test_auxiliary_heads_of_the_model_itself() -> None:
    gm = assert_faithful(WithAuxiliary(), (4,))
    assert kinds(gm).count("ModeSwitch") == 1
    statistics = gm.aux_norm.running_mean.clone()
    gm.eval()(torch.randn(3, 4))
    assert torch.equal(gm.aux_norm.running_mean, statistics)


class DropsTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        if self.training:
            keep = torch.randperm(x.shape[1])[:2]
            x, position = x[:, keep], position[keep]
        else:
            x = x.clone().add_(1)
        return (self.fc(x) + position[:, None]).mean(1)


def test_branches_that_the_other_mode_cannot_run() -> None:
    gm = assert_faithful(DropsTokens(), (5, 4))
    assert "ModeBranch" in kinds(gm)
    again = pickle.loads(pickle.dumps(copy.deepcopy(gm))).train()
    torch.manual_seed(0)
    expected = gm.train()(torch.ones(2, 5, 4))
    torch.manual_seed(0)
    assert torch.equal(again(torch.ones(2, 5, 4)), expected)


class TrainsAnotherPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.norm(x)


def test_a_branch_that_would_do_harm_leaves_the_graph_of_evaluation() -> None:
    model = TrainsAnotherPath().eval()
    with pytest.warns(UserWarning, match="calls norm in evaluation only"):
        gm = capture(model, torch.empty(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(AssertionError, match="returns='module'"):
        gm.train()(x)
    gm = assert_faithful(nn.Sequential(nn.Linear(4, 4), TrainsAnotherPath()), (4,))
    assert kinds(gm) == ["Linear", "TrainsAnotherPath"]


class NeedsTargets(nn.Module):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training:
            return (x - targets).square().mean()
        return x * 2


def test_a_model_that_cannot_train_on_these_inputs_is_captured_for_evaluation() -> None:
    with pytest.warns(UserWarning, match="fails in training mode with these inputs"):
        gm = capture(NeedsTargets(), torch.empty(2, 4))
    assert torch.equal(gm.eval()(torch.ones(1, 4)), torch.full((1, 4), 2.0))


class LayerDrop(nn.Module):
    """Leaves out layers by a random number, in training."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layers, self.draw = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and self.draw() < 0.5):
                x = layer(x).relu()
        return x


class DropsByItsOwn(nn.Module):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(4, 4), generator

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and self.generator.random() < 0.5 else self.layer(x)


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand([]),
    "item": lambda: torch.rand(1).item(),
    "python": random.random,
    "numpy": np.random.rand,
    "own generator": random.Random(0).random,
    "own numpy generator": np.random.default_rng(0).random,
    "old numpy generator": np.random.RandomState(0).rand,
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_graph_of_evaluation_refuses_to_train_where_the_model_trains_otherwise(draw: str) -> None:
    model, x = LayerDrop(DRAWS[draw]), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="cannot be traced in training mode.*returns='module'"):
        gm = capture(model, x)
    for graph in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)) if draw == "python" else gm):
        assert torch.equal(graph.eval()(x), model.eval()(x))
        with pytest.raises(
            AssertionError, match=r"LayerDrop: .* this graph is for evaluation.*returns='modu"
        ):
            graph.train()(x)
    again = capture(gm.eval(), x)
    assert torch.equal(again(x), model.eval()(x))
    with pytest.raises(AssertionError, match="this graph is for evaluation"):
        again.train()(x)
    assert list(gm.state_dict()) == list(model.state_dict())


@pytest.mark.filterwarnings("ignore:capture:UserWarning")
@pytest.mark.parametrize("make", [random.Random, np.random.default_rng])
def test_a_part_that_draws_from_a_generator_of_its_own_stays_whole(make: Callable[[int], Any]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), DropsByItsOwn(make(0))), torch.randn(2, 4)
    captured = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"1 \(DropsByItsOwn\) kept whole: its forward draws random numbers"):
        gm = capture(captured, x)
    assert kinds(gm) == ["Linear", "DropsByItsOwn"]
    assert all(torch.equal(gm(x), model(x)) for _ in range(10))  # and nothing was drawn by the capture


@pytest.mark.filterwarnings("ignore:capture:UserWarning")
def test_a_model_that_drops_layers_is_pruned_and_trains_as_its_own_class() -> None:
    model, x = LayerDrop(DRAWS["torch"]).train(), torch.randn(8, 4)
    data = (x, torch.arange(8) % 4)
    graph = apply(model, "snip", 0.5, example_inputs=x, data=data, progress=False)
    with pytest.raises(AssertionError, match="this graph is for evaluation"):
        graph(x)
    pruned = apply(model, "snip", 0.5, example_inputs=x, data=data, progress=False, returns="module")
    found = [pruned(x) for _ in range(20)]
    assert not all(torch.equal(found[0], other) for other in found)
    assert all(torch.equal(mask, masks(graph)[name]) for name, mask in masks(pruned).items())
    for seed in range(5):  # the model with the weights of its masks draws as the pruned one does
        plain = copy.deepcopy(model)
        with torch.no_grad():
            for name, mask in masks(pruned).items():
                plain.get_parameter(name).mul_(mask)
        torch.manual_seed(seed)
        wanted = plain(x)
        torch.manual_seed(seed)
        assert torch.equal(pruned(x), wanted)


def test_flags_are_the_models() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Block()).eval()
    model[1].train()
    gm = capture(model, torch.empty(2, 4))
    assert not gm.training
    assert [m.training for m in model.modules()] == [False, False, True, True, True]
    gm.train()
    assert all(module.training for module in gm.modules())


class ReadsMoreInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2, 3, 4]))

    def forward(self, x: Tensor) -> Tensor:
        kept = (x * self.scale).narrow(1, 0, 2 if self.training else 4)
        out = kept.sum(1)
        return out if self.training else out + (kept * self.scale).mean(1)


def test_what_evaluation_does_to_another_shape_does_not_run_in_training() -> None:
    gm = assert_faithful(ReadsMoreInEvaluation(), (4,))
    assert "ModeBranch" in kinds(gm)


class Decodes(nn.Module):
    """Is kept whole, for it decides by a random number in training, and gives more in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        raw = self.layer(x)
        if self.training:
            return [raw * 2 if float(torch.rand([])) < 2 else raw]
        return self.decode(raw), [raw]


class CallsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Decodes()

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(x), self.head(x[:, ::2].relu())


@pytest.mark.filterwarnings("ignore:capture")
def test_a_head_that_is_called_twice_is_captured_again() -> None:
    net, x = CallsTwice().eval(), torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    first = capture(net, x)
    again = capture(first, x)
    for training in (False, True):
        expected = pytree.tree_leaves(net.train(training)(x))
        for graph in (first, again):
            found = pytree.tree_leaves(graph.train(training)(x))
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, expected))
    slices = [node for node in first.graph.nodes if node.target is operator.getitem]
    assert not any(isinstance(node.args[1], fx.Node) for node in slices), "each index is its own"


class WritesInEvaluation(nn.Module):
    """Convolves a part of its channels, in evaluation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.training:
            some, rest = torch.split(x, [4, 4], 1)
            return self.last(torch.cat([self.part(some), rest], 1))
        x[:, :4] = self.part(x[:, :4])
        return self.last(x)


def test_what_evaluation_writes_into_is_not_read_by_what_training_does() -> None:
    model, x = WritesInEvaluation(), torch.randn(2, 3, 8, 8)
    gm = capture(model, x)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        pairs = [(gm(x), gm), (model(x), model)]
        assert torch.equal(pairs[0][0], pairs[1][0])
        if training:  # in evaluation the model's own write forbids the backward pass
            assert torch.equal(*(torch.autograd.grad(one.sum(), net.first.weight)[0] for one, net in pairs))


class Memory:
    """Keeps the last steps of a sequence, for a call that goes on with it."""

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}

    def keep(self, x: Tensor) -> None:
        batch, channels, _ = x.shape
        self.steps["last"] = torch.zeros(batch, channels, 3, dtype=x.dtype, device=x.device)
        self.steps["last"].copy_(x[..., -3:])


class Mixes(nn.Module):
    """Convolves a sequence, channel by channel, with a weight that it reads as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)
        self.conv = nn.Conv1d(8, 8, 4, groups=8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        y = self.first(x).transpose(1, 2)
        if self.training:
            self.scale.float()  # for a kernel that is not there
        if memory is not None:
            memory.keep(y)
        _, channels, length = y.shape
        matrix = self.conv.weight.squeeze(1)
        y = F.conv1d(y.to(matrix.dtype), matrix.unsqueeze(1), self.conv.bias, padding=3, groups=channels)
        return self.last((F.silu(y[..., :length]).transpose(1, 2) * self.scale).to(x.dtype))


class RemembersInEvaluation(nn.Module):
    """Hands a memory on from layer to layer, and out, in evaluation."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), Mixes()) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Memory] | None]:
        memories = None if self.training else [Memory() for _ in self.layers]
        for index, layer in enumerate(self.layers):
            x = x + layer[1](layer[0](x), memories[index] if memories else None)
        return x, memories


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = RemembersInEvaluation(2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Memory] | None]:
        y, memories = self.body(x)
        return self.head(y), memories


@pytest.mark.filterwarnings("error:capture")  # nothing stays whole
@pytest.mark.parametrize("make", [lambda: RemembersInEvaluation(2), Inner])
def test_layers_that_are_handed_a_memory_in_evaluation_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 5, 6)
    gm = capture(model, x)
    for batch in (x, torch.randn(3, 7, 6)):
        for training in (True, False):
            (found, kept), (wanted, expected) = gm.train(training)(batch), model.train(training)(batch)
            assert torch.equal(found, wanted)
            assert (kept is None) is (expected is None) is training
            for one, other in zip(kept or (), expected or (), strict=True):
                assert torch.equal(one.steps["last"], other.steps["last"])
    pruned = apply(model, "synflow", 0.5, example_inputs=x, rounds=2, progress=False)
    prefix = "body." if isinstance(model, Inner) else ""
    assert masks(pruned).keys() >= {f"{prefix}layers.0.1.conv.weight", f"{prefix}layers.1.1.last.weight"}


class CastsAndTrainsOtherwise(nn.Module):
    """Computes in single precision, gives the inputs' own, and has another head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x)
        y = F.layer_norm(y.float(), (4,)).to(y.dtype)
        return (self.head(y), self.other(y)) if self.training else self.head(y)


def test_types_follow_the_inputs_in_both_modes() -> None:
    torch.manual_seed(0)
    model, x = CastsAndTrainsOtherwise(), torch.randn(2, 4)
    gm = capture(model, x).bfloat16()
    half = copy.deepcopy(model).bfloat16()
    for training in (True, False):
        found, wanted = (net.train(training)(x.bfloat16()) for net in (gm, half))
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
            assert one.dtype == other.dtype == torch.bfloat16
            assert torch.equal(one, other)
