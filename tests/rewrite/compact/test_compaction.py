"""Compaction: smaller networks with the outputs of the masked ones, on every small net of the suite."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channels.removal import zero_group
from nets import NETS
from thinning import one_in
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

import fxprune
from fxprune.graph import ir
from fxprune.paths.count import reach
from fxprune.rewrite.compact import CompactedLayer, Compaction

KINDS = sorted(NETS)


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return tensors(model(**inputs))
        return tensors(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= 1e-5 * max(1.0, float(a.detach().abs().max()))


def drawn(kind: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A net of the suite with weights and biases that leave no zeros."""
    torch.manual_seed(seed)
    model, inputs = NETS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_() if parameter.dim() > 1 else parameter.uniform_(0.2, 1.0)
    return model.eval(), inputs


def zero_channels(model: nn.Module, share: float, *, inputs: bool, biases: bool) -> None:
    """Zero random output (and input) channels of every layer, in the plain eager model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                weight = module.weight
                axis = 1 if isinstance(module, _ConvNd) and module.transposed else 0
                gone = torch.rand(weight.shape[axis]) < share
                weight.movedim(axis, 0)[gone] = 0
                if biases and module.bias is not None and len(module.bias) == len(gone):
                    module.bias[gone] = 0
                if inputs:
                    weight.movedim(1 - axis, 0)[torch.rand(weight.shape[1 - axis]) < share] = 0


def effective(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """The weights on some path, by kernel set."""
    gm = fxprune.capture(model, example)
    graph = fxprune.lower(gm)
    computed = {op.weight.name for op in graph.ops if isinstance(op, ir.Kernel) and op.weight.computed}
    masks = {name: gm.get_parameter(name).detach() != 0 for name in graph.kernels if name not in computed}
    return reach(graph, masks, resolution="channel")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("kind", "everything"), one_in(2, KINDS, [False, True]))
def test_zeroed_channels_go_and_outputs_stay(kind: str, everything: bool) -> None:
    model, example = drawn(kind)
    zero_channels(model, 0.4, inputs=everything, biases=everything)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if not any(bool(mask.any()) for mask in effective(model, example).values()):
        with pytest.raises(ValueError, match="no path leads"):
            fxprune.compact(model, example)
        return
    small = fxprune.compact(model, example)
    assert_same(run(model, example), run(small, example))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    table = small.meta["fxprune"]["compaction"]
    assert table.parameters[1] == sum(p.numel() for p in small.parameters()) <= table.parameters[0]


@pytest.mark.parametrize(
    "kind", ["residual", "projection", "conv_chain", "depthwise", "grouped", "pixel_shuffle"]
)
def test_channel_masks_are_harvested_whole(kind: str) -> None:
    model, example = drawn(kind)
    pruned = fxprune.apply(
        model, "magnitude", 0.4, granularity="channel", example_inputs=example, progress=False
    )
    small = fxprune.compact(pruned)
    assert_same(run(pruned.eval(), example), run(small, example))
    kept = {name: int(mask.sum()) for name, mask in fxprune.masks(pruned).items()}
    table = small.meta["fxprune"]["compaction"]
    layers = {layer.name: layer.weights[1] for layer in table.layers}
    assert layers == {name: number for name, number in kept.items() if name in layers}
    # The masks of biases say what is left of them too.
    shapes = {name: small.get_parameter(name).numel() for name in kept}
    assert shapes == kept
    assert table.given_back == 0


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return model.eval(), torch.randn(2, 3, 6, 6)


def test_the_smaller_network_trains_saves_compiles_and_is_pruned_again() -> None:
    model, x = net()
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned).train()
    optimizer = torch.optim.AdamW(small.parameters())
    small(x).square().mean().backward()
    optimizer.step()
    small.eval()
    again = fxprune.apply(small, "magnitude", 0.5, granularity="channel", progress=False)
    smaller = fxprune.compact(again)
    assert_same(run(again.eval(), x), run(smaller, x))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    exported = torch.export.export(smaller, (x,)).module()
    assert_same(run(smaller, x), tensors(exported(x)))


def test_gradients_of_surviving_weights_are_those_of_the_masked_network() -> None:
    model, x = net()
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    for one in (pruned.train(), small.train()):
        one(x).square().mean().backward()
    masks = fxprune.masks(pruned)
    for name, mask in masks.items():
        whole, part = pruned.get_parameter(name).grad, small.get_parameter(name).grad
        assert whole is not None
        assert part is not None
        assert torch.allclose(whole[mask], part.flatten(), atol=1e-6)


def test_other_batch_and_image_sizes() -> None:
    model, x = net()
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    for shape in ((1, 3, 6, 6), (5, 3, 9, 7)):
        other = torch.randn(shape)
        assert_same(run(pruned.eval(), other), run(small, other))


def test_constants_move_into_biases_where_that_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([0.5, 2.0])
    x = torch.randn(4, 3)
    small = fxprune.compact(model, x)
    assert small.get_submodule("0").weight.shape == (2, 3)
    assert_same(run(model, x), run(small, x))
    kept = fxprune.compact(model, x, fold_constants=False)
    assert kept.get_submodule("0").weight.shape == (4, 3)
    assert "a constant" in str(kept.meta["fxprune"]["compaction"])


def test_a_constant_under_zero_padding_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 1.0
    x = torch.randn(1, 2, 5, 5)
    small = fxprune.compact(model, x)
    assert small.get_submodule("0").weight.shape[0] == 4
    assert "a constant under zero padding" in str(small.meta["fxprune"]["compaction"])
    assert_same(run(model, x), run(small, x))


class TwoReaders(nn.Module):
    """A constant channel, read by a layer that can take it into its bias and by one that cannot."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.pointwise, self.padded = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.first == "pointwise":
            return self.pointwise(x) * 2 + self.padded(x)
        return self.padded(x) + self.pointwise(x) * 2


@pytest.mark.parametrize("first", ["pointwise", "padded"])
def test_a_constant_that_one_reader_needs_is_folded_by_none(first: str) -> None:
    torch.manual_seed(0)
    model = TwoReaders(first)
    with torch.no_grad():
        model.stem.weight[0] = 0
        model.stem.bias[0] = 1.0  # type: ignore[index]
    x = torch.randn(1, 2, 5, 5)
    small = fxprune.compact(model, x)
    assert small.get_submodule("stem").weight.shape[0] == 4
    assert_same(run(model, x), run(small, x))


def test_operations_in_place_do_not_change_what_was_recorded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[0].weight[:2], model[2].weight[0] = 0, 0
    x = torch.randn(4, 3)
    small = fxprune.compact(model, x)
    assert small.get_submodule("0").weight.shape[0] == 2
    assert_same(run(model, x), run(small, x))


class Normed(nn.Module):
    """A residual stream under a layer norm."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Linear(4, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )
        self.norm, self.last = norm(8), norm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        out: Tensor = self.head(self.last(x))
        return out


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_compute_what_they_did_over_all_channels(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Normed(norm).eval(), torch.randn(2, 5, 4)
    pruned = fxprune.apply(model, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    assert small.get_submodule("embed").weight.shape[0] < 8
    assert_same(run(pruned.eval(), x), run(small, x))
    plain = fxprune.compact(pruned, exact=False)
    assert type(plain.get_submodule("norm")) is norm
    assert run(plain, x)[0].shape == (2, 5, 3)


def test_a_standardised_weight_is_left_alone() -> None:
    model, x = drawn("standard")
    zero_channels(model, 0.4, inputs=True, biases=True)
    small = fxprune.compact(model, x)
    assert_same(run(model, x), run(small, x))


def test_bad_input() -> None:
    model, x = net()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got a int"):
        fxprune.compact(3)  # type: ignore[arg-type]
    with torch.device("meta"):
        hollow = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"model: 'weight' has no values .* load the weights first"):
        fxprune.compact(hollow, torch.ones(1, 3))
    with torch.no_grad():
        model[3].weight.zero_()  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match=r"no path leads from its inputs to its outputs.*3\.weight"):
        fxprune.compact(model, x)


def test_nothing_to_remove_says_so() -> None:
    model, x = net()
    small = fxprune.compact(model, x)
    assert "nothing to remove" in str(small.meta["fxprune"]["compaction"])
    assert isinstance(small, fx.GraphModule)
    assert_same(run(model, x), run(small, x))


class RunningSums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).cumsum(1))
        return out


def test_channels_that_are_held_are_not_called_nothing() -> None:
    model, x = RunningSums(), torch.randn(5, 3)
    with torch.no_grad():
        model.first.weight[1] = 0.0
    table = fxprune.compact(model, x).meta["fxprune"]["compaction"]
    assert table.given_back == 1
    assert "nothing was removed: 1 output channels without effective weights are held" in str(table)
    assert "nothing to remove" not in str(table)


class GroupNormed(nn.Module):
    """A group norm, as a module or as a function, between two convolutions."""

    def __init__(self, groups: int, *, affine: bool, functional: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.norm = nn.GroupNorm(groups, 8, affine=affine)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.functional:
            x = nn.functional.group_norm(x, self.norm.num_groups, self.norm.weight, self.norm.bias)
        else:
            x = self.norm(x)
        out: Tensor = self.last(x.relu())
        return out


@pytest.mark.thinned(3)
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("groups", "gone"), [(1, [0, 3]), (2, [1, 2, 4, 7]), (4, [2, 3]), (4, [0, 3, 5, 6])])
def test_group_norms_compute_what_they_did(
    groups: int, gone: list[int], affine: bool, functional: bool
) -> None:
    torch.manual_seed(0)
    model = GroupNormed(groups, affine=affine, functional=functional).eval()
    with torch.no_grad():
        for parameter in (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias):
            if parameter is not None:
                parameter[gone] = 0
        model.last.weight[:, gone] = 0
    x = torch.randn(2, 3, 5, 5)
    small = fxprune.compact(model, x)
    assert small.get_parameter("first.weight").shape[0] == 8 - len(gone)
    for inputs in (x, torch.randn(3, 3, 4, 7)):
        assert_same(run(model, inputs), run(small, inputs))
    plain = fxprune.compact(model, x, exact=False)
    assert plain.get_parameter("first.weight").shape[0] == 8 - len(gone)
    assert run(plain, x)[0].shape == (2, 2, 5, 5)


def test_a_weight_in_two_modules_and_a_weight_read_backwards_get_smaller() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight
            self.down = nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.two(self.one(x).relu())
            x = x + nn.functional.linear(self.down(x).relu(), self.down.weight.t())
            out: Tensor = self.last(x)
            return out

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 5)
    groups = [group for group in fxprune.channel_groups(model, x) if group.removable]
    graph = fxprune.lower(fxprune.capture(model, x))
    for group in (groups[0], groups[-1]):  # a channel of the stream, and one of `down`
        zero_group(model, graph, group)
    small = fxprune.compact(model, x)
    assert small.get_parameter("one.weight") is small.get_parameter("two.weight")
    assert small.get_parameter("one.weight").shape == (3, 3)
    assert small.get_parameter("down.weight").shape == (5, 3)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert_same(run(model, x), run(small, x))


@pytest.mark.slow
def test_channel_masks_cover_biases_norms_and_tables() -> None:
    model, x = net()
    model = nn.Sequential(*list(model)[:4], nn.GroupNorm(1, 8), *list(model)[4:])
    for returns in ("graph", "module"):
        pruned = fxprune.apply(
            model, "magnitude", 0.5, budget="uniform", granularity="channel", example_inputs=x,
            progress=False, returns=returns,
        )  # fmt: skip
        masks = fxprune.masks(pruned)
        # A norm over channels would see the biases before it; what 0.bias gives, no layer reads.
        assert "0.bias" not in masks
        for name, weight in (("3.bias", "3.weight"), ("4.bias", "3.weight")):
            assert torch.equal(masks[name], masks[weight].flatten(1).any(1))
            assert not bool(pruned.get_parameter(name)[~masks[name]].any())
        again = fxprune.apply(
            pruned, "magnitude", 0.7, granularity="channel", example_inputs=x, progress=False
        )
        assert all(bool((fxprune.masks(again)[name] <= mask).all()) for name, mask in masks.items())
        assert fxprune.analyze(again, example_inputs=x).density <= 0.3
        assert fxprune.compact(again, x).meta["fxprune"]["compaction"].given_back == 0


def test_a_number_that_cannot_change_holds_its_own_channels_alone() -> None:
    """Numbers are counted in the forward beside the second layer; the first one is cut as asked."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.two(self.one(x).relu())
            out: Tensor = self.last(y + torch.ones_like(y).cumsum(1))
            return out

    torch.manual_seed(0)
    net, x = Written().eval(), torch.randn(2, 3)
    with torch.no_grad():
        for layer in (net.one, net.two):
            layer.weight[[0, 3, 4]] = 0
            layer.bias[[0, 3, 4]] = 0
    small = fxprune.compact(net, x)
    assert small.get_parameter("one.weight").shape == (5, 3)
    assert small.get_parameter("two.weight").shape == (8, 5)
    assert_same(run(small, x), run(net, x))


def test_inputs_that_the_network_does_not_take_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    gm = fxprune.capture(net, torch.ones(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"^example_inputs: the network does not run on \(1, 1, 8, 8\)"
    ) as caught:
        fxprune.compact(gm, torch.ones(1, 1, 8, 8))
    assert "\n" not in str(caught.value)


def test_numbers_of_the_table_have_thousands_separators() -> None:
    table = Compaction((CompactedLayer("a", (1200, 600), (3, 3), (3600, 1800), (7200, 3600), 0, ""),), (1, 1))
    assert "1,200 -> 600" in str(table)
    assert "3,600 -> 1,800" in str(table)
