"""The pass of docs/write_a_pass.md finds what channel groups hold, and what compaction rewrites."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from channels.removal import zero_group
from nets import NETS
from thinning import one_in
from torch import fx, nn
from torchvision.models import resnet18

import fxprune
from fxprune.graph import ChannelGraph, ir
from fxprune.graph.literals import SizeLiteral

PAGE = (Path(__file__).parents[2] / "docs" / "write_a_pass.md").read_text(encoding="utf-8")
Slices = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def belonging() -> Callable[[ChannelGraph, str, int], tuple[Slices, list[tuple[str, SizeLiteral]]]]:
    """The page's function, with nothing but what the page imports before it is defined."""
    names: dict[str, Any] = {"torch": torch}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[:1]:
        assert set(re.findall(r"^from (\w+\.\w+)", block, re.MULTILINE)) <= {"fxprune.graph"}
        exec(block, names)
    found: Any = names["belonging"]
    return found


def vit() -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, embed_dim=24, num_classes=5
    )
    return model, torch.randn(1, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": lambda: (resnet18(), torch.randn(1, 3, 32, 32)),
    "vit": vit,
    "grouped": lambda: (timm.create_model("test_resnet"), torch.randn(1, 3, 32, 32)),
    **NETS,
}


def expected_slices(graph: ChannelGraph, group: Any) -> Slices:
    """The members of a group along the axes of the tensors."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for member in group.members:
        if isinstance(member.axis, int):
            found[member.parameter, member.axis].update(member.indices)
            continue
        kernels = graph.kernels[member.parameter]
        axis = kernels.out_axis if member.axis == "out" else 1 - kernels.out_axis
        # Channels run over all groups, of which the parameter's second axis holds one.
        if kernels.shape[axis] > 1:
            found[member.parameter, axis].update(index % kernels.shape[axis] for index in member.indices)
    return {place: sorted(indices) for place, indices in found.items()}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", one_in(2, MODELS))
def test_slices_are_those_of_the_channels_group(name: str, belonging: Any) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    gm = fxprune.capture(model.eval(), inputs)
    graph = fxprune.lower(gm)
    groups = [group for group in fxprune.channel_groups(gm) if group.removable]
    step = max(1, len(groups) // 12)
    for group in groups[::step]:
        first = next(member for member in group.members if member.axis == "out")
        channel = first.indices[0]
        if graph.kernels[first.parameter].transposed:
            channel %= graph.kernels[first.parameter].shape[1]
        slices, _ = belonging(graph, first.parameter, channel)
        assert slices == expected_slices(graph, group), (first.parameter, channel)


def numbers(gm: fx.GraphModule, node: str, literal: SizeLiteral) -> Any:
    """The number in a literal's place in a network's graph."""
    found = next(one for one in gm.graph.nodes if one.name == node)
    step, *rest = literal.place
    value: Any = found.args[step] if isinstance(step, int) else found.kwargs[step]
    for step in rest:
        value = getattr(value, step) if isinstance(step, str) else value[step]
    return value


class Reshaped(nn.Module):
    """Numbers in views, splits and slices that depend on channels, on heads and on neither."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 6)
        self.conv, self.last = nn.Conv2d(3, 7, 1), nn.Linear(28, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 5, 8)
        first, second = self.conv(y).split([3, 4], 1)
        y = torch.cat([second, first], 1)[:, :, :, 0:2].reshape(-1, 28)
        return self.proj(mixed), self.last(y)


@pytest.mark.slow
def test_literals_are_those_that_compaction_changes(belonging: Any) -> None:
    torch.manual_seed(0)
    model, inputs = Reshaped(), (torch.randn(2, 5, 6), torch.randn(2, 3, 2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.2, 1.0)
    gm = fxprune.capture(model, inputs)
    graph = fxprune.lower(gm)
    every = [(op.node, literal) for op in graph.ops if isinstance(op, ir.Gather) for literal in op.literals]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[int] = []
    for group in (group for group in fxprune.channel_groups(gm) if group.removable):
        first = next(member for member in group.members if member.axis == "out")
        _, literals = belonging(graph, first.parameter, first.indices[0])
        model.load_state_dict(state)
        zero_group(model, graph, group)
        small = fxprune.compact(model, inputs)
        for node, literal in every:
            before, after = (numbers(one, node, literal) for one in (gm, small))
            assert (before != after) == ((node, literal) in literals), (first, node, literal)
        seen += [literal.value for _, literal in literals]
    assert set(seen) == {4, 8, 3, 28}
