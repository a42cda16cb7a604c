"""The list of channel groups: what is in each, what goes with it, and why some stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS
from torch import nn
from torch.nn.utils import parametrizations

import fxprune
from channels.grouping import Net
from channels.removal import zero_group
from fxprune.channels.groups import ChannelSlice
from fxprune.cli import run


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()


def test_members_numbers_and_reasons_by_hand() -> None:
    table = fxprune.channel_groups(chain(), torch.randn(2, 3, 5, 5))
    assert [group.id for group in table] == list(range(6))
    one = table[1]
    assert set(one.members) == {
        ChannelSlice("0.weight", "out", (1,)),
        ChannelSlice("3.weight", "in", (1,)),
        ChannelSlice("1.weight", 0, (1,)),
        ChannelSlice("1.bias", 0, (1,)),
        ChannelSlice("1.running_mean", 0, (1,)),
        ChannelSlice("1.running_var", 0, (1,)),
    }
    # 27 weights of its row, 2 of its column, a scale and a shift of the norm; at 25 positions.
    assert (one.size, one.parameters, one.macs, one.removable) == (1, 27 + 2 + 2, 25 * (27 + 2), True)
    held = table[5]
    assert not held.removable
    assert held.reason == "output: an output of the network"
    assert (held.parameters, held.members) == (
        5,
        (ChannelSlice("3.weight", "out", (1,)), ChannelSlice("3.bias", 0, (1,))),
    )
    text = str(table)
    assert "0-3                  4    1          31           725  0.weight out, 3.weight in" in text
    assert "stays: output: an output of the network" in text
    assert text.endswith("6 groups, 4 of which can go")


def test_an_excluded_layer_and_a_group_that_is_all_of_a_layer_say_why() -> None:
    table = fxprune.channel_groups(chain(), torch.randn(2, 3, 5, 5), exclude="0")
    assert [group.reason for group in table[:4]] == ["0.weight is excluded"] * 4
    net = Net(
        lambda net, x: net.last(net.first(x) + net.first(x).flip(1)),
        first=nn.Conv2d(3, 2, 1), last=nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    one = fxprune.channel_groups(net, torch.randn(2, 3, 4, 4))[0]
    assert (one.size, one.reason) == (2, "it is all outputs of first.weight")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "kind", ["residual", "depthwise", "grouped", "transposed", "excite_sigmoid", "glu", "mlp_bias"]
)
def test_what_goes_with_a_group_is_what_compaction_removes(kind: str) -> None:
    torch.manual_seed(0)
    model, example = NETS[kind]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.2, 1.0)
    graph = fxprune.lower(fxprune.capture(model, example))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    table = fxprune.channel_groups(model, example)
    free = [group for group in table if group.removable]
    assert free
    for group in (free[0], free[-1]):
        model.load_state_dict(state)
        zero_group(model, graph, group)
        done = fxprune.compact(model, example).meta["fxprune"]["compaction"]
        assert done.given_back == 0
        assert done.parameters[0] - done.parameters[1] == group.parameters
        assert done.macs[0] - done.macs[1] == group.macs


def test_a_pruned_model_needs_no_inputs_and_is_left_alone() -> None:
    model = chain()
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=torch.ones(2, 3, 5, 5), progress=False
    )
    masks = {name: mask.clone() for name, mask in fxprune.masks(pruned).items()}
    assert fxprune.channel_groups(pruned)[1] == fxprune.channel_groups(model, torch.ones(2, 3, 5, 5))[1]
    assert all(torch.equal(masks[name], mask) for name, mask in fxprune.masks(pruned).items())


def test_whole_heads_are_groups_on_request() -> None:
    torch.manual_seed(0)
    model, example = NETS["attention"]()
    by_channel = [group.size for group in fxprune.channel_groups(model, example) if group.removable]
    by_head = [
        group.size for group in fxprune.channel_groups(model, example, whole_heads=True) if group.removable
    ]
    assert max(by_head) > max(by_channel)
    assert len(by_head) < len(by_channel)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got a int"):
        fxprune.channel_groups(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude: 'nowhere' fits nothing"):
        fxprune.channel_groups(chain(), torch.ones(2, 3, 5, 5), exclude="nowhere")


def test_the_command_prints_the_table_or_json(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "factory.py"
    file.write_text(
        "import torch\nfrom torch.nn import Linear, Sequential\n"
        "def net():\n    return Sequential(Linear(4, 8), Linear(8, 2)), torch.ones(2, 4)\n"
    )
    assert run(["groups", f"{file}:net"]) == 0
    assert "10 groups, 8 of which can go" in capsys.readouterr().out
    assert run(["groups", f"{file}:net", "--exclude", "0", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)
    assert groups[0]["reason"] == "0.weight is excluded"
    assert groups[9]["members"][0] == {"parameter": "1.weight", "axis": "out", "indices": [1]}


def test_weights_that_are_computed_have_the_channels_that_apply_removes() -> None:
    first = parametrizations.weight_norm(nn.Linear(4, 6))
    model, x = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 2)), torch.ones(2, 4)
    for given in (model, fxprune.apply(model, "magnitude", 0.3, example_inputs=x, progress=False)):
        groups = fxprune.channel_groups(given, x)
        assert [member.parameter for member in groups[0].members] == ["0.weight", "2.weight", "0.bias"]
        assert sum(group.removable for group in groups) == 6
    assert "weight" not in dict(first.named_parameters())
