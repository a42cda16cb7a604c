"""Input channels name the layers and channels that they come from: what a change of one channel reaches.

The independent computation: the eager model runs with the outputs of all layers held at their values, but for
one channel of one layer (or of the input) that is changed; hooks see which channels of which inputs differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, lowered_net
from torch import Tensor, nn

import fxprune
from fxprune.graph import ChannelGraph, Space

Body = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Layers by name, and a forward that is given as a function."""

    def __init__(self, body: Body, **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Body, side: int = 4, **layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return Net(body, **layers).double(), torch.rand(2, 3, side, side, dtype=torch.float64)


def conv(inputs: int, outputs: int, taps: int = 1, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, taps, padding=taps // 2, **options)


def two(last: nn.Module, **more: nn.Module) -> dict[str, nn.Module]:
    return {"a": conv(3, 4), "b": conv(3, 2), **more, "last": last}


def excite(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.last(x * m.b(x.mean((2, 3), keepdim=True)).sigmoid())


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x.flatten(2).mT).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return m.last(((q @ k.mT).exp() @ v).transpose(1, 2).flatten(2))


def split_and_cross(m: Any, x: Tensor) -> Tensor:
    a, b, c = m.a(x).split([1, 2, 1], 1)
    return m.last(torch.cat([b.flip(1), torch.zeros_like(a), a * c], 1))


def nested(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    inner = torch.cat([b, a[:, 1:3]], 1)
    return m.last(torch.cat([x, torch.cat([inner, a], 1), m.c(inner)], 1))


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y + m.b(y).tanh()
    y = y + m.c(y)
    return m.last(y)


def mixer(m: Any, x: Tensor) -> Tensor:
    return m.last(m.b(m.a(x).flatten(2)).mT)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "concat": lambda: net(lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1)), **two(conv(6, 2))),
    "concat, the other order": lambda: net(
        lambda m, x: m.last(torch.cat([m.b(x), m.a(x)], 1)), **two(conv(6, 2, 3))
    ),
    "nested concats": lambda: net(nested, **two(conv(13, 2), c=conv(4, 2))),
    "flatten": lambda: net(
        lambda m, x: m.last(m.a(x).flatten(1)), side=2, a=conv(3, 4), last=nn.Linear(16, 2)
    ),
    "flatten of the input": lambda: net(lambda m, x: m.last(x.flatten(1)), side=2, last=nn.Linear(12, 2)),
    "chunks": lambda: net(
        lambda m, x: m.last(m.b(x) * m.a(x).chunk(2, 1)[1].tanh()), **two(conv(2, 2))
    ),
    "split": lambda: net(split_and_cross, a=conv(3, 4), last=conv(4, 2)),
    "pixel shuffle": lambda: net(
        lambda m, x: m.last(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), last=conv(2, 2)
    ),
    "pixel unshuffle": lambda: net(
        lambda m, x: m.last(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 2), last=conv(8, 2)
    ),
    "residual sums": lambda: net(residual, a=conv(3, 4), b=conv(4, 4, 3), c=conv(4, 4), last=conv(4, 2)),
    "groups": lambda: net(
        lambda m, x: m.last(F.channel_shuffle(m.a(x), 2)), a=conv(3, 4), last=conv(4, 6, 3, groups=2)
    ),
    "transposed": lambda: net(
        lambda m, x: m.last(m.a(x)), a=conv(3, 4), last=nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
    ),
    "excitation": lambda: net(excite, a=conv(3, 4), b=conv(4, 4), last=conv(4, 2)),
    "attention": lambda: net(attention, qkv=nn.Linear(3, 12), last=nn.Linear(4, 2)),
    "pools": lambda: net(
        lambda m, x: m.last(F.avg_pool2d(m.a(x), 3, 1, 1).mean(3).flatten(1)),
        a=conv(3, 4),
        last=nn.Linear(16, 2),
    ),
    "pools of the input": lambda: net(
        lambda m, x: m.last(F.avg_pool2d(x, 2).flatten(1)), side=6, last=nn.Linear(27, 2)
    ),
    "positions": lambda: net(mixer, side=2, a=conv(3, 4), b=nn.Linear(4, 5), last=nn.Linear(4, 2)),
    "fixed weights": lambda: net(
        lambda m, x: m.last(F.conv2d(m.a(x), torch.ones(4, 1, 2, 2, dtype=x.dtype), groups=4)),
        a=conv(3, 4), last=conv(4, 2),
    ),
}  # fmt: skip


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def axis_of(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def record(model: nn.Module, x: Tensor, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Run the model; ``change`` is asked for every layer's output. Return the inputs of all layers."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def call(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            seen[name] = inputs[0].clone()
            return change(name, output)

        return call

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers_of(model).items()]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def reached(model: nn.Module, x: Tensor) -> dict[tuple[str, int], set[tuple[Any, ...]]]:
    """(layer, input channel) -> what changes it: (layer, output channel), or ("", index of the input)."""
    outputs: dict[str, Tensor] = {}
    before = record(model, x, lambda name, y: outputs.setdefault(name, y))
    found: dict[tuple[str, int], set[tuple[Any, ...]]] = defaultdict(set)

    def compare(cause: tuple[Any, ...], x: Tensor, changed: dict[str, Tensor]) -> None:
        after = record(model, x, lambda name, y: changed.get(name, outputs[name]))
        for name, layer in layers_of(model).items():
            differs = (after[name] != before[name]).movedim(axis_of(layer), 0).flatten(1).any(1)
            for channel in differs.nonzero().flatten().tolist():
                found[name, channel].add(cause)

    for name, layer in layers_of(model).items():
        axis = axis_of(layer)
        for channel in range(outputs[name].shape[axis]):
            other = outputs[name].clone()
            part = other.select(axis, channel)
            part += 1 + torch.rand_like(part)
            compare((name, channel), x, {name: other})
    for place in torch.ones_like(x[0]).nonzero().tolist():
        other = x.clone()
        other[(slice(None), *place)] += 1
        compare(("", tuple(place)), other, {})
    return found


def named(graph: ChannelGraph, sources: tuple[Any, ...], shape: torch.Size) -> set[tuple[Any, ...]]:
    """The sources with inputs spelled out as entries."""
    found: set[tuple[Any, ...]] = set()
    for space, channel in sources:
        if space != "%0":
            found.add((space, channel))
            continue
        entries = torch.ones(shape).nonzero().tolist()
        if isinstance(channel, tuple):
            found |= {("", tuple(entry)) for entry in entries if tuple(entry) == channel}
        else:
            found |= {("", tuple(entry)) for entry in entries if entry[0] == channel}
    return found


@pytest.mark.parametrize("case", CASES)
def test_input_channels_are_those_that_a_change_reaches(case: str) -> None:
    model, x = CASES[case]()
    graph = fxprune.lower(fxprune.capture(model, x))
    expected = reached(model, x)
    for name in layers_of(model):
        for channel, sources in enumerate(graph.input_channels(f"{name}.weight")):
            assert named(graph, sources, x.shape[1:]) == expected[name, channel], (name, channel)


@pytest.mark.parametrize("case", CASES)
def test_the_channel_graph_has_an_edge_per_kernel_and_source(case: str) -> None:
    model, x = CASES[case]()
    graph = fxprune.lower(fxprune.capture(model, x))
    exported = graph.to_networkx("channel")
    found = {(a, b, data["kernel"], data["index"]) for a, b, data in exported.edges(data=True)}
    assert len(found) == exported.number_of_edges()
    expected = set()
    for name, kernels in graph.kernels.items():
        sources = graph.input_channels(name)
        for first in range(kernels.shape[0]):
            for second in range(kernels.shape[1]):
                group = first // (kernels.shape[0] // kernels.groups)
                far = group * kernels.shape[1] + second
                row, column = (far, first) if kernels.transposed else (first, far)
                for source in sources[column]:
                    expected.add((source, (kernels.out_space.name, row), name, (first, second)))
    assert found == expected


def spaces(exported: Any) -> dict[str, int]:
    found: dict[str, set[Any]] = defaultdict(set)
    for space, channel in exported.nodes:
        found[space].add(channel)
    return {space: len(channels) for space, channels in found.items()}


def test_spaces_have_as_many_channels_as_their_layers() -> None:
    model, x = CASES["concat, the other order"]()
    graph = fxprune.lower(fxprune.capture(model, x))
    assert spaces(graph.to_networkx("channel")) == {"%0": 3, "a": 4, "b": 2, "last": 2}
    assert graph.kernels["last.weight"].in_space.name not in {"a", "b"}
    assert graph.kernels["last.weight"].in_space.size == 6


def test_a_space_keeps_its_layers_name_only_while_it_is_that_layers() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.a(x)).relu()  # a's channels, moved to the last axis
        y = m.b(x.permute(0, 2, 3, 1).flatten(1, 2))
        return m.last((y + m.c(y)).flip(-1))  # neither b's nor c's

    model, x = net(body, a=conv(3, 4), norm=nn.BatchNorm2d(4), b=nn.Linear(4, 5), c=nn.Linear(5, 5),
                   last=nn.Linear(5, 2))  # fmt: skip
    kernels = fxprune.lower(fxprune.capture(model, x)).kernels
    assert kernels["a.weight"].in_space == Space("%0", 3)
    assert kernels["b.weight"].in_space == Space("a", 4)
    assert kernels["c.weight"].in_space == Space("b", 5)
    assert kernels["last.weight"].in_space.name.startswith("%")
    assert kernels["last.weight"].in_space.size == 5


def test_a_flipped_space_is_not_that_of_the_layer() -> None:
    model, x = net(lambda m, x: m.last(m.a(x).flip(1)), a=conv(3, 4), last=conv(4, 2))
    graph = fxprune.lower(fxprune.capture(model, x))
    assert graph.kernels["last.weight"].in_space.name.startswith("%")
    assert graph.input_channels("last.weight") == tuple((("a", channel),) for channel in (3, 2, 1, 0))


def test_two_projections_of_one_module_are_two_spaces() -> None:
    net = CrossAttention()
    graph = fxprune.lower(fxprune.capture(net, (torch.ones(2, 3, 4), torch.ones(2, 5, 6))))
    names = {kernels.out_space.name for kernels in graph.kernels.values()}
    assert len(names) == len(graph.kernels) == 4


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attention(x, y, y, need_weights=False)[0]
        return result


class PackedProjection(nn.Module):
    """Each third of one parameter is used for itself; the decoder reads the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.encode = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.encode(self.attention(x, y, y, need_weights=False)[0])
        return z @ self.encode.weight


def test_a_part_of_a_parameter_makes_its_own_channels() -> None:
    graph = fxprune.lower(fxprune.capture(PackedProjection(), (torch.ones(2, 3, 4), torch.ones(2, 5, 4))))
    exported = graph.to_networkx("channel")
    packed = {
        (source, target[1], data["index"])
        for source, target, data in exported.edges(data=True)
        if data["kernel"] == "attention.in_proj_weight"
    }
    expected = {((f"%{i // 4 > 0:d}", j), i, (i, j)) for i in range(12) for j in range(4)}
    assert packed == expected
    last = [
        (source[0], target[1], data["index"])
        for source, target, data in exported.edges(data=True)
        if data["kernel"] == "encode.weight" and source[0] == "encode"
    ]
    assert sorted(last) == [("encode", j, (i, j)) for j in range(4) for i in range(3)]


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_small_network_has_sources_for_each_input_channel(name: str) -> None:
    graph = lowered_net(name)
    made = {kernels.out_space.name: kernels.out_space.size for kernels in graph.kernels.values()}
    for kernel, kernels in graph.kernels.items():
        channels = graph.input_channels(kernel)
        assert len(channels) == kernels.in_space.size
        for space, channel in {source for sources in channels for source in sources}:
            assert space.startswith("%") or channel in range(made[space])
    assert any(sources for kernel in graph.kernels for sources in graph.input_channels(kernel))


def test_a_large_network_is_not_exported_by_channels() -> None:
    graph = fxprune.lower(fxprune.capture(nn.Linear(400, 400), torch.ones(1, 400)))
    with pytest.raises(ValueError, match="160,000 kernels, more than 100,000"):
        graph.to_networkx("channel")
