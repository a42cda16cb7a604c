"""The peak of activations, against a run that looks at every tensor's memory, whole and compacted."""

from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from channels.grouping import Net, graph_of
from fxprune.capture import capture
from fxprune.channels.groups import group_channels
from fxprune.channels.memory import Peak, count_memory, live_ranges


class Watched(fx.Interpreter):
    """Run node by node and keep all results, so that no memory is used twice."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.found: dict[fx.Node, set[int]] = {}
        self.bytes: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = set()
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.found[n].add(storage.data_ptr())
                self.bytes[storage.data_ptr()] = storage.nbytes()
        return result


def measured_peak(gm: fx.GraphModule, *inputs: Any) -> int:
    """The most bytes that are needed at one time while real tensors go through the network."""
    gm.eval()
    run = Watched(gm)
    with torch.no_grad():
        run.run(*inputs)
    weights = {t.untyped_storage().data_ptr() for t in (*gm.parameters(), *gm.buffers())}
    nodes = list(gm.graph.nodes)
    peak = 0
    for time in range(len(nodes)):
        needed = set(run.found[nodes[time]])
        for past in nodes[:time]:
            if any(nodes.index(user) >= time for user in past.users):
                needed |= run.found[past]
        peak = max(peak, sum(run.bytes[address] for address in needed - weights))
    return peak


def one_sample(inputs: Any) -> list[Any]:
    flat = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    return [x[:1].clone() for x in flat]


def peak_of(model: nn.Module, inputs: Any) -> Peak:
    gm = capture(model, inputs)
    graph = fxprune.lower(gm)
    return count_memory(live_ranges(gm, graph), group_channels(graph))


@pytest.mark.parametrize("kind", one_in(2, sorted(NETS)))
def test_the_peak_is_that_of_a_run(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[kind]()
    gm = capture(model.eval(), inputs)
    assert peak_of(model, inputs).whole == measured_peak(gm, *one_sample(inputs))


def test_inputs_views_and_writes_in_place() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = torch.relu_(net.one(x))  # 4 x 3 x 16 bytes in, 5 of out; relu_ takes no more
        kept = y.transpose(1, 2)  # a view keeps y alive
        z = net.two(y)  # with y: 5 + 7
        return net.two(kept.transpose(1, 2)).add_(z)  # y, z and the second result: 5 + 7 + 7

    net = Net(forward, one=nn.Conv2d(3, 5, 1), two=nn.Conv2d(5, 7, 1))
    peak = peak_of(net, torch.ones(2, 3, 4, 4))
    assert peak.whole == 4 * 16 * (5 + 7 + 7)
    # A channel of the first layer is in two steps of three, one of the second alone in the peak.
    every = torch.ones(peak.groups, dtype=torch.bool)
    assert peak.saved(every).tolist() == [64.0] * 5


def test_saved_is_the_difference_that_one_group_makes() -> None:
    torch.manual_seed(0)
    for kind in ("residual", "dense", "vit", "split_concat" if "split_concat" in NETS else "shuffle"):
        model, inputs = NETS[kind]()
        peak = peak_of(model, inputs)
        staying = torch.rand(peak.groups) < 0.8
        for group in staying.nonzero().flatten().tolist():
            fewer = staying.clone()
            fewer[group] = False
            assert peak.saved(staying)[group] == pytest.approx(peak.left(staying) - peak.left(fewer))


class Wide(nn.Module):
    """A stem that is wide at full resolution, a residual block, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.three, self.last = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.one(x))))
        return self.last((y + torch.relu(self.three(y))).mean((2, 3)))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_a_target_is_met_by_the_network_that_is_left(scope: str, sparsity: float) -> None:
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(2, 3, 8, 8)
    pruned = fxprune.apply(
        model, "magnitude", sparsity, granularity="channel", of="memory", scope=scope, example_inputs=x,
        progress=False,
    )  # fmt: skip
    small = fxprune.compact(pruned, x)
    limit = measured_peak(capture(model, x), x[:1]) * (1 - sparsity)
    left = measured_peak(small, x[:1])
    # The dearest channel is alive three times over: y, the third layer's output, and its relu.
    assert limit - 3 * 4 * 64 <= left <= limit


def test_layers_away_from_the_peak_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(32, 8, 3), nn.Flatten()
    )
    x = torch.randn(2, 3, 16, 16)
    masks = fxprune.masks(
        fxprune.apply(model, "magnitude", 0.5, granularity="channel", of="memory", example_inputs=x)
    )
    assert int(masks["0.weight"].flatten(1).any(1).sum()) == 16
    assert masks["3.weight"].flatten(1).any(1).all()


def test_a_target_out_of_reach_says_which_is_not_and_what_holds_it() -> None:
    model, x = Wide().eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must stay.*last\.weight.*sparsity of at most (0\.\d+)") as error:
        fxprune.apply(model, "magnitude", 0.97, granularity="channel", of="memory", example_inputs=x)
    most = float(str(error.value).rsplit(" ", 1)[1])
    fxprune.apply(model, "magnitude", most, granularity="channel", of="memory", example_inputs=x)
    with pytest.raises(ValueError, match=r"min_channels=12"):
        fxprune.apply(
            model, "magnitude", most, granularity="channel", of="memory", min_channels=12, example_inputs=x
        )


def test_the_graph_alone_says_nothing_of_memory() -> None:
    from fxprune.sparsity.channel_granularity import fitted
    from fxprune.sparsity.granularity import Channel

    graph = graph_of(Wide(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="of='memory'"):
        fitted(Channel(of="memory"), graph, graph.kernels)
