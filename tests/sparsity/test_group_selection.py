"""The choice of channel groups: rows and columns, exact counts, pooled scores, budgets per family."""

from typing import Any

import pytest
import torch
from channels.grouping import graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.channels.cost import count_macs
from fxprune.graph import ChannelGraph
from fxprune.paths.count import reach
from fxprune.sparsity.budget import Budget, plan
from fxprune.sparsity.channel_granularity import fitted
from fxprune.sparsity.collapse import dead_layers, repair
from fxprune.sparsity.granularity import Channel, Granularity
from fxprune.sparsity.group_order import by_worth
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks, dense, is_subset, total
from fxprune.sparsity.select import select

Shapes = dict[str, tuple[int, ...]]


def problem(model: nn.Module, inputs: Any, pool: str = "mean") -> tuple[ChannelGraph, ChannelGroups, Shapes]:
    graph = graph_of(model, inputs)
    channels = fitted(Channel(pool=pool), graph, graph.kernels)
    assert isinstance(channels, ChannelGroups)
    return graph, channels, {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}


def chain() -> tuple[nn.Module, Tensor]:
    """2 -> 3 -> 2 -> 1 features: 6 + 6 + 2 weights."""
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1)), torch.ones(2, 2)


SCORES = {
    "0.weight": torch.tensor([[1.0, 3.0], [4.0, 0.0], [9.0, 9.0]]),
    "1.weight": torch.tensor([[2.0, 6.0, 9.0], [0.0, 2.0, 9.0]]),
    "2.weight": torch.tensor([[5.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        # Groups: the channels of layer 0 (a row of 2, a column of 2), then those of layer 1 (3 and 1).
        ("mean", [6 / 4, 12 / 4, 36 / 4, 22 / 4, 12 / 4]),
        ("sum", [6, 12, 36, 22, 12]),
        ("l2", [14**0.5, 56**0.5, 18.0, 146**0.5, 86**0.5]),
        ("max", [3, 6, 9, 9, 9]),
    ],
)
def test_scores_of_rows_and_columns_are_pooled(pool: str, expected: list[float]) -> None:
    _, channels, _ = problem(*chain(), pool=pool)
    pooled, alive = channels.pool(SCORES, dense(SCORES))
    assert pooled.tolist() == pytest.approx(expected)
    assert alive.all()


@pytest.mark.parametrize("taps", [1, 3])
def test_a_bundle_has_the_weights_of_the_rows_that_each_group_has(taps: int) -> None:
    """Rows of 2 in the first layer, of 3 in the second; the rows of the last one stay."""
    layers = [nn.Conv1d(i, o, taps) for i, o in ((2, 3), (3, 2), (2, 1))]
    _, channels, shapes = problem(nn.Sequential(*layers), torch.ones(2, 2, 9))
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    masks = dense(scores)
    masks["0.weight"][1, 0, 0] = False
    (bundle,) = channels.bundles(scores, masks)
    assert bundle.sizes.tolist() == [2 * taps, 2 * taps - 1, 2 * taps, 3 * taps, 3 * taps]


def test_pruned_weights_do_not_count() -> None:
    _, channels, _ = problem(*chain())
    within = dense(SCORES)
    within["0.weight"][0] = False
    within["1.weight"][:, 0] = False
    pooled, alive = channels.pool(SCORES, within)
    assert alive.tolist() == [False, True, True, True, True]
    assert pooled[3:].tolist() == pytest.approx([20 / 3, 12 / 3])


def test_the_mean_over_a_family_is_that_of_what_is_left() -> None:
    graph = graph_of(*chain())
    channels = fitted(Channel(pool="sum", normalize="family"), graph, graph.kernels)
    assert isinstance(channels, ChannelGroups)
    within = dense(SCORES)
    within["0.weight"][0] = False
    within["1.weight"][:, 0] = False
    pooled, _ = channels.pool(SCORES, within)
    # Left: 12 and 36 in the first family, whose mean is 24; 20 and 12 in the second, whose mean is 16.
    assert pooled.tolist() == pytest.approx([0, 12 / 24, 36 / 24, 20 / 16, 12 / 16])


def test_rows_and_columns_go_and_are_counted_once() -> None:
    _, channels, shapes = problem(*chain())
    # Lowest first: channel 0 of layer 0 (2 + 2 weights), then of the two with mean 3 the later one, channel 1
    # of layer 1 (2 weights of its row are left, and 1).
    for sparsity, kept in ((1 / 14, 10), (4 / 14, 10), (5 / 14, 7), (7 / 14, 7)):
        masks = select(SCORES, plan("global", sparsity, shapes), granularity=channels)
        assert total(masks) == kept
    assert masks["0.weight"].tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert masks["1.weight"].tolist() == [[False, True, True], [False] * 3]
    assert masks["2.weight"].tolist() == [[True, False]]


def test_the_best_channel_of_every_layer_stays() -> None:
    _, channels, _ = problem(*chain())
    # One channel is left in both layers: 2 + 1 + 1 weights.
    masks = select(
        SCORES, Budget(4, {name: score.numel() for name, score in SCORES.items()}), granularity=channels
    )
    assert [int(mask.sum()) for mask in masks.values()] == [2, 1, 1]
    assert masks["0.weight"][2].all()
    with pytest.raises(ValueError, match="at least 4 must stay"):
        select(
            SCORES, Budget(3, {name: score.numel() for name, score in SCORES.items()}), granularity=channels
        )


NAMES = [
    "residual",
    "depthwise",
    "grouped",
    "excite_sigmoid",
    "vit",
    "transposed",
    "shuffle",
    "pixel_shuffle",
]


def draw(net: str, seed: int) -> tuple[ChannelGraph, ChannelGroups, Shapes, dict[str, Tensor]]:
    torch.manual_seed(seed)
    graph, channels, shapes = problem(*NETS[net]())
    return graph, channels, shapes, {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 9),
    st.floats(0.05, 0.5),
    st.sampled_from(["global", "uniform", "erk"]),
)
def test_one_group_more_would_not_fit(net: str, seed: int, sparsity: float, how: Any) -> None:
    graph, channels, shapes, scores = draw(net, seed)
    budget = plan(how, sparsity, shapes)
    try:
        masks = select(scores, budget, granularity=channels)
    except ValueError:
        return  # one channel of every layer is more than that
    left = total(masks)
    assert left <= budget.total
    alive = channels.pool(scores, masks)[1]
    gone = channels.pool(scores, dense(scores))[1] & ~(_present(channels, masks) & alive)
    # Some group that is gone would exceed the budget if it came back.
    back = []
    for group in gone.nonzero().flatten().tolist():
        staying = ~gone
        staying[group] = True
        back.append(sum(int(channels.groups.kept(name, staying).sum()) for name in masks))
    assert not back or max(back) > budget.total
    assert not dead_layers(graph, reach(graph, masks))


def _present(channels: ChannelGroups, masks: Masks) -> Tensor:
    """The groups of which any weight is left."""
    present = torch.zeros(channels.groups.count, dtype=torch.bool)
    for name, mask in masks.items():
        for numbers in channels.groups.by_weight(name):
            own = numbers.expand(mask.shape)[mask]
            present[own[own >= 0]] = True
    return present


@pytest.mark.parametrize("how", ["uniform", "erk"])
def test_every_family_gives_its_share(how: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    _, channels, shapes = problem(model, torch.ones(2, 8))
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    scores["1.weight"] *= 100  # scores of different layers are not compared
    budget = plan(how, 0.6, shapes)
    masks = select(scores, budget, granularity=channels)
    first, second = int(masks["0.weight"].any(1).sum()), int(masks["1.weight"].any(1).sum())
    assert budget.layers is not None
    if how == "uniform":
        assert abs(first - second) <= 1
    else:
        density = {name: budget.layers[name] / budget.sizes[name] for name in shapes}
        assert density["0.weight"] > 2 * density["1.weight"]
        assert first > 2 * second, "the smaller layer keeps more"


def test_tied_layers_share_a_budget() -> None:
    _, channels, shapes, scores = draw("residual", 0)
    masks = select(scores, plan("uniform", 0.5, shapes), granularity=channels)
    rows = [masks[name].flatten(1).any(1).tolist() for name in ("0.weight", "1.body.weight")]
    assert rows[0] == rows[1]
    assert 0 < sum(rows[0]) < 6


def test_what_was_pruned_stays_pruned() -> None:
    _, channels, shapes, scores = draw("excite_sigmoid", 1)
    before = select(scores, plan("global", 0.3, shapes), granularity=channels)
    other = {name: torch.rand(shape) for name, shape in shapes.items()}
    kept = {name: int(mask.sum()) for name, mask in before.items()}
    after = select(other, plan("global", 0.5, shapes, kept), within=before, granularity=channels)
    assert is_subset(after, before)
    assert total(after) < total(before)


@pytest.mark.parametrize("net", ["residual", "excite_sigmoid", "vit"])
def test_repair_puts_every_layer_on_a_path_in_whole_groups(net: str) -> None:
    graph, channels, shapes, scores = draw(net, 0)
    budget = plan("global", 0.4, shapes)
    masks = select(scores, budget, granularity=channels)
    emptied = next(name for name in shapes if bool((channels.groups.rows[name] >= 0).all()))
    masks[emptied] = torch.zeros_like(masks[emptied])
    granularity: Granularity = channels
    found = repair(graph, masks, scores, budget, within=dense(scores), granularity=granularity)
    assert not dead_layers(graph, reach(graph, found))
    assert total(found) <= budget.total
    whole = _present(channels, found)
    assert all(torch.equal(channels.groups.kept(name, whole), mask) for name, mask in found.items())


def test_shuffled_masks_keep_as_many_groups() -> None:
    _, channels, shapes, scores = draw("excite_sigmoid", 2)
    masks = select(scores, plan("global", 0.4, shapes), granularity=channels)
    order = {name: torch.rand(shape) for name, shape in shapes.items()}
    shuffled = channels.shuffle(masks, order, dense(scores), per_family=True)
    for name in ("first.weight", "reduce.weight"):
        number = [int(m[name].flatten(1).any(1).sum()) for m in (masks, shuffled)]
        assert number[0] == number[1]


# -- targets in parameters and multiply-adds --------------------------------------------------------------
class Stages(nn.Module):
    """Two convolutions at full resolution, two at a quarter of the positions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.three, self.four = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 40, 1)
        self.norm, self.last = nn.BatchNorm2d(40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.one(x))))
        return self.last(self.norm(self.four(torch.relu(self.three(y)))).mean((2, 3)))


def costs_of(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Parameters, and multiply-adds for one sample as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return float(sum(p.numel() for p in model.parameters())), counter.get_total_flops() / 2 / len(x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_a_target_is_met_by_the_network_that_is_left(of: str, scope: str, sparsity: float) -> None:
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    grain = Channel(of=of, scope=scope)
    pruned = fxprune.apply(model, "magnitude", sparsity, granularity=grain, example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x)
    place = ("params", "macs").index(of)
    whole, left = costs_of(model, x)[place], costs_of(small, x)[place]
    limit = whole * (1 - sparsity)
    # The dearest channel is one of the second layer: its own row and the next layer's column.
    dearest = (16 * 9 * 64 + 24 * 9 * 16) if of == "macs" else (16 * 9 + 24 * 9 + 2)
    assert limit - dearest <= left <= limit


class Blocks(nn.Module):
    """Four blocks as wide as one another, on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(12, 30) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(30, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("sparsity", [0.15, 0.3, 0.55, 0.85])
def test_blocks_stay_alike_under_a_uniform_scope(sparsity: float, round_to: int) -> None:
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(2, 12)
    grain = Channel(scope="uniform", round_to=round_to)
    pruned = fxprune.apply(model, "magnitude", sparsity, granularity=grain, example_inputs=x, progress=False)
    widths = [int(fxprune.masks(pruned)[f"ups.{block}.weight"].any(1).sum()) for block in range(4)]
    assert len(set(widths)) == 1
    assert widths[0] % round_to == 0
    # The widest that meet the sparsity: a step more would be too much. The stream keeps its 12 channels.
    assert widths[0] == int(30 * (1 - sparsity) + 1e-9) // round_to * round_to


def test_multiply_adds_are_saved_where_they_are() -> None:
    # At full resolution a weight costs four times as many as behind the stride, so that those go first.
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    widths = {}
    for of in ("params", "macs"):
        pruned = fxprune.apply(model, "magnitude", 0.5, granularity=Channel(of=of), example_inputs=x)
        weights = dict(fxprune.compact(pruned, x).named_parameters())
        widths[of] = [weights[f"{name}.weight"].shape[0] for name in ("one", "two", "three", "four")]
    assert sum(widths["macs"][:2]) < sum(widths["params"][:2])


def test_widths_are_rounded_and_the_target_is_met() -> None:
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    for of, place in (("params", 0), ("macs", 1)):
        grain = Channel(of=of, round_to=4)
        pruned = fxprune.apply(model, "magnitude", 0.5, granularity=grain, example_inputs=x)
        small = fxprune.compact(pruned, x)
        shapes = [parameter.shape for name, parameter in small.named_parameters() if "weight" in name]
        assert all(shape[0] % 4 == 0 for shape in shapes[:-1])
        assert costs_of(small, x)[place] <= costs_of(model, x)[place] / 2


def test_every_layer_keeps_what_it_must() -> None:
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    least = {"one.weight": 16, "two.weight": 16, "three.weight": 24, "four.weight": 40}
    for grain, minimum in (
        (Channel(min_channels=7), lambda n: 7),
        (Channel(max_sparsity=0.25), lambda n: 0.75 * n),
    ):
        with pytest.raises(ValueError, match="must stay"):
            fxprune.apply(model, "magnitude", 0.9, granularity=grain, example_inputs=x)
        pruned = fxprune.apply(model, "magnitude", 0.3, granularity=grain, example_inputs=x)
        weights = dict(fxprune.compact(pruned, x).named_parameters())
        assert all(weights[name].shape[0] >= minimum(number) for name, number in least.items())


@pytest.mark.slow
def test_numbers_by_layer_hold_for_the_outputs_of_those_that_they_name() -> None:
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)

    with torch.no_grad():
        model.three.weight.mul_(0.1), model.four.weight.mul_(0.1)

    def widths(sparsity: float, **options: Any) -> dict[str, int]:
        grain = Channel(**options)
        pruned = fxprune.apply(model, "magnitude", sparsity, granularity=grain, example_inputs=x)
        weights = dict(fxprune.compact(pruned, x).named_parameters())
        return {name: len(weights[f"{name}.weight"]) for name in ("one", "two", "three", "four")}

    plain = widths(0.6)
    assert widths(0.6, max_sparsity={"two": 0.0, "*": 0.95})["two"] == 16 > plain["two"]
    assert widths(0.6, max_sparsity={"three.weight": 0.5})["three"] >= 12 > plain["three"]
    assert widths(0.6, min_channels={"th*": 20})["three"] >= 20 > plain["three"]
    with pytest.raises(ValueError, match=r"max_sparsity: 'five' fits no prunable layer; .* 'one.weight'"):
        widths(0.6, max_sparsity={"five": 0.5})


def test_each_family_or_kind_loses_the_same_share() -> None:
    torch.manual_seed(0)
    model, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.one.weight.mul_(100), model.four.weight.mul_(0.01)
    pruned = fxprune.apply(model, "magnitude", 0.5, granularity=Channel(scope="layer"), example_inputs=x)
    weights = dict(fxprune.compact(pruned, x).named_parameters())
    kept = [
        weights[f"{name}.weight"].shape[0] / n
        for name, n in (("one", 16), ("two", 16), ("three", 24), ("four", 40))
    ]
    assert max(kept) - min(kept) <= 1 / 16


def test_unknown_costs_and_scopes_are_refused() -> None:
    for options in (
        {"of": "flops"},
        {"scope": "local"},
        {"round_to": 0},
        {"min_channels": 1.5},
        {"max_sparsity": 0.0},
        {"max_sparsity": {"*": 1.5}},
        {"min_channels": {"*": 0}},
        {"round_to": {"*": 4}},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Channel(**options)


def test_costs_are_brought_up_to_date_while_groups_go() -> None:
    # Two layers in a row: a channel of the second costs its row, which shrinks with the first layer.
    _, channels, _ = problem(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)), torch.ones(1, 4)
    )
    cost = count_macs(channels.groups)
    alive = torch.ones(channels.groups.count, dtype=torch.bool)
    worth = torch.arange(1.0, 17.0, dtype=torch.float64)
    order = by_worth(worth, cost, alive, alive.clone(), limit=0.0)
    staying = alive.clone()
    left = cost.left(alive)
    for group in order.tolist():
        ratio = (worth / cost.saved(staying).clamp(min=1e-12))[staying]
        # The order is brought up to date after every 4 % of the cost: within that, nearly the lowest goes.
        assert worth[group] / cost.saved(staying)[group].clamp(min=1e-12) <= 3 * ratio.min() + 1e-9
        staying[group] = False
        assert cost.left(staying) <= left
        left = cost.left(staying)
