"""The text of lowered networks equals the files in ``tests/golden``: a change of the graph shows as a diff.

After an intended change write the files anew, and read the diff before committing it:

    REGENERATE=1 python -m pytest tests/graph/test_golden.py
"""

import os
import pickle
from pathlib import Path

import pytest
import torch
from nets import NETS, lowered_net

from fxprune import capture, lower
from fxprune.graph import ChannelGraph

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [
    "attention",
    "dead_taps",
    "dense",
    "encoder",
    "excite_sigmoid",
    "flatten",
    "grouped",
    "layer_scale",
    "max_pool",
    "norms",
    "residual",
    "split",
    "tied",
    "transposed",
]


def lowered(name: str, seed: int) -> ChannelGraph:
    torch.manual_seed(seed)
    return lower(capture(*NETS[name]()))


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_stored_one(name: str) -> None:
    file = GOLDEN / f"{name}.txt"
    text = lowered_net(name).text()
    if os.environ.get("REGENERATE"):
        file.write_text(text)
    assert text == file.read_text()


def test_every_file_belongs_to_a_network() -> None:
    assert sorted(file.name for file in GOLDEN.iterdir()) == sorted(f"{name}.txt" for name in NAMES)


@pytest.mark.parametrize("name", ["attention_einsum", "mixer", "multihead", "window"])
def test_text_depends_on_the_structure_alone(name: str) -> None:
    graph = lowered_net(name)
    assert lowered(name, seed=1).text() == graph.text()
    assert pickle.loads(pickle.dumps(graph)).text() == graph.text()
    assert " at 0x" not in graph.text()


def test_long_lists_of_indices_are_counted() -> None:
    conv = torch.nn.Conv2d(34, 34, 1, groups=17, bias=False)
    text = lower(capture(conv, torch.ones(2, 34, 4, 4))).text()
    assert "weight[%1.1, %0.1 at <34 entries>, -, -] in 17 groups" in text


def test_opaque_ops_show_their_reason() -> None:
    class Bounded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lu_factor(x)[0]

    assert (
        "Opaque(%0) | at linalg_lu_factor | no rule for" in lower(capture(Bounded(), torch.ones(4, 4))).text()
    )
