import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.sparsity.budget import Budget, apportion, count, erk_densities, fill, plan

# The 22 prunable tensors of the CIFAR ResNet-20 with 1x1 shortcuts, in order: 270,896 weights.
RESNET20 = {
    str(index): shape
    for index, shape in enumerate(
        [(16, 3, 3, 3)]
        + [(16, 16, 3, 3)] * 6
        + [(32, 16, 3, 3), (32, 32, 3, 3), (32, 16, 1, 1)]
        + [(32, 32, 3, 3)] * 4
        + [(64, 32, 3, 3), (64, 64, 3, 3), (64, 32, 1, 1)]
        + [(64, 64, 3, 3)] * 4
        + [(10, 64)]
    )
}
SIZES = {name: math.prod(shape) for name, shape in RESNET20.items()}

shapes = st.lists(
    st.one_of(
        st.tuples(*[st.integers(1, 20)] * 2),
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.just(3), st.just(3)),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: {f"layer{i}": shape for i, shape in enumerate(found)})
densities = st.floats(0, 1, exclude_min=True)


def test_the_rounding_rule() -> None:
    assert count(10, 1 - 0.9) == 1  # int((1 - 0.9) * 10) would be 0
    assert count(3, 0.5) == 2
    assert [count(4, d) for d in (0.0, 0.124, 0.125, 1.0)] == [0, 0, 1, 4]


def test_a_count_of_weights_given_as_sparsity_is_met() -> None:
    assert plan("erk", 1 - 865 / 270896, RESNET20).total == 865
    for asked in (1, 22, 865, 135448, 270895):
        assert plan("global", 1 - asked / 270896, RESNET20).total == asked


def test_erk_of_two_small_layers() -> None:
    # Sizes 4 and 2, ratios 1 and 3/2. d = .5: eps = 3 / (4 + 3) = 3/7. d = .8: 1.5 eps > 1, so the second
    # layer is dense and the first takes (4.8 - 2) / 4.
    found = erk_densities({"a": (2, 2), "b": (1, 2)}, 0.5)
    assert found == pytest.approx({"a": 3 / 7, "b": 9 / 14})
    assert erk_densities({"a": (2, 2), "b": (1, 2)}, 0.8) == pytest.approx({"a": 0.7, "b": 1.0})


@pytest.mark.parametrize(
    ("compression", "total", "per_tensor"),
    [
        (2, 2718, [42, *[63] * 6, 89, 115, 83, *[115] * 4, 168, 220, 161, *[220] * 4, 122]),
        (2.5, 866, [13, *[20] * 6, 29, 37, 26, *[37] * 4, 53, 70, 51, *[70] * 4, 39]),
        (1, 27104, None),
        (0.5, 85674, None),
        (1.5, 8582, None),
        (3, 282, None),
    ],
)
def test_erk_on_resnet20(compression: float, total: int, per_tensor: list[int] | None) -> None:
    # Published counts remove int(sparsity * n) per tensor, which rounds every share up.
    found = erk_densities(RESNET20, 10**-compression)
    published = [SIZES[name] - int((1 - density) * SIZES[name]) for name, density in found.items()]
    assert sum(published) == total
    assert per_tensor is None or published == per_tensor
    # Ours meets the total exactly, so that each tensor has the share rounded up, or down.
    budget = plan("erk", 1 - 10**-compression, RESNET20)
    assert budget.layers is not None
    assert sum(budget.layers.values()) == budget.total == count(270896, 10**-compression)
    differences = [up - ours for up, ours in zip(published, budget.layers.values(), strict=True)]
    assert set(differences) <= {0, 1}


def test_erk_dense_tensors_of_resnet20() -> None:
    assert [name for name, d in erk_densities(RESNET20, 0.1).items() if d == 1] == ["9", "21"]
    assert [name for name, d in erk_densities(RESNET20, 10**-0.5).items() if d == 1] == ["0", "9", "16", "21"]


@given(shapes, densities, st.sampled_from(["uniform", "erk"]))
def test_layers_sum_to_the_total_and_share_in_proportion(
    shapes: dict[str, tuple[int, ...]], density: float, kind: str
) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = count(sum(sizes.values()), 1 - (1 - density))
    if total < 1:
        return
    budget = plan(kind, 1 - density, shapes)
    assert budget.layers is not None
    assert budget.total == total == sum(budget.layers.values())
    assert all(0 <= budget.layers[name] <= size for name, size in sizes.items())
    if total >= len(sizes):
        assert all(budget.layers.values()), "a layer was left with nothing although there was enough"
        weights = {n: s * (1 if kind == "uniform" else sum(shapes[n]) / s) for n, s in sizes.items()}
        shares = fill(total, weights, dict.fromkeys(sizes, 1), sizes)
        assert all(abs(budget.layers[name] - share) < 1 for name, share in shares.items())


@given(shapes, st.data())
def test_budgets_honour_what_is_left(shapes: dict[str, tuple[int, ...]], data: st.DataObject) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = {name: data.draw(st.integers(0, size)) for name, size in sizes.items()}
    kind = data.draw(st.sampled_from(["uniform", "erk"]))
    asked = data.draw(st.integers(0, sum(left.values())))
    if not asked:
        return
    budget = plan(kind, 1 - asked / sum(sizes.values()), shapes, left)
    assert budget.layers is not None
    assert sum(budget.layers.values()) == asked
    assert all(budget.layers[name] <= left[name] for name in sizes)


def test_what_a_layer_cannot_take_goes_to_the_others() -> None:
    # Half of 8 + 8 + 8 is 12, 4 each; the first has 1 left, the others share 11.
    budget = plan("uniform", 0.5, {"a": (8, 1), "b": (8, 1), "c": (8, 1)}, {"a": 1, "b": 8, "c": 8})
    assert budget.layers == {"a": 1, "b": 6, "c": 5}


@given(shapes, densities)
def test_fill_is_the_fixed_point_of_making_full_layers_dense(
    shapes: dict[str, tuple[int, ...]], density: float
) -> None:
    # The published procedure, written out: promote the layer of the largest ratio while it would exceed 1.
    ratios = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(sizes):
        open_layers = [name for name in sizes if name not in dense]
        room = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        eps = room / sum(ratios[name] * sizes[name] for name in open_layers)
        largest = max(ratios[name] for name in open_layers)
        if eps * largest <= 1 + 1e-12:
            break
        dense |= {name for name in open_layers if ratios[name] == largest}
    expected = {name: 1.0 if name in dense else eps * ratios[name] for name in sizes}
    assert erk_densities(shapes, density) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_density_next_to_one() -> None:
    for kind in ("uniform", "erk"):
        full = plan(kind, 0.0, RESNET20)
        assert full.layers == SIZES
        assert plan(kind, 1e-12, RESNET20).layers == SIZES
        assert plan(kind, 1 / 270896, RESNET20).total == 270895


def test_apportion_breaks_ties_by_order_and_gives_everyone_one() -> None:
    assert apportion(4, dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 9)) == {"a": 2, "b": 1, "c": 1}
    assert apportion(3, {"a": 100.0, "b": 1.0, "c": 1.0}, dict.fromkeys("abc", 99)) == {
        "a": 1,
        "b": 1,
        "c": 1,
    }
    assert apportion(2, {"a": 100.0, "b": 1.0, "c": 1.0}, dict.fromkeys("abc", 99)) == {
        "a": 2,
        "b": 0,
        "c": 0,
    }
    with pytest.raises(ValueError, match="cannot split 4 weights over layers that have room for 3"):
        apportion(4, {"a": 1.0}, {"a": 3})


def test_a_dict_names_layers_modules_and_patterns() -> None:
    shapes = {"stem.conv.weight": (10, 10), "body.0.conv.weight": (10, 10), "body.1.weight": (10, 10)}
    shapes["head.weight"] = (10, 10)
    given = {"body.*": 0.9, "stem.conv": 0.5, "body.1.weight": 0.25}
    budget = plan(given, 0.8, shapes)
    # A name goes before a pattern, wherever it stands; what nothing names takes the overall sparsity.
    expected = {"stem.conv.weight": 50, "body.0.conv.weight": 10, "body.1.weight": 75, "head.weight": 20}
    assert budget.layers == expected
    assert budget.total == sum(expected.values())


def test_the_first_pattern_that_fits_wins() -> None:
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    assert plan({"a*": 0.5, "*": 0.9}, 0.1, shapes).layers == {"a.weight": 50, "b.weight": 10}
    assert plan({"*": 0.9}, 0.1, shapes).layers == {"a.weight": 10, "b.weight": 10}


@pytest.mark.parametrize(
    ("allocation", "sparsity", "error", "words"),
    [
        ("erk", 1.0, ValueError, r"sparsity=1.0: expected a number in \[0, 1\)"),
        ("erk", -0.1, ValueError, r"sparsity=-0.1"),
        ("erk", math.nan, ValueError, r"sparsity=nan"),
        ("erk", "0.9", TypeError, r"sparsity='0.9'"),
        ("erk", True, TypeError, r"sparsity=True"),
        (
            "erk-plus",
            0.9,
            ValueError,
            r"budget='erk-plus': expected 'global', .*'owl' or a dict",
        ),
        (3, 0.9, TypeError, r"budget=3"),
        ({"nowhere*": 0.5}, 0.9, ValueError, r"budget: 'nowhere\*' fits no prunable layer"),
        ({"a": 1.5}, 0.9, ValueError, r"budget\['a'\]=1.5: expected a number in \[0, 1\]"),
        ({"*": 1.0}, 0.9, ValueError, "keeps none of the 12 prunable weights"),
        ("global", 0.99, ValueError, "sparsity=0.99 keeps none of the 12 prunable weights"),
    ],
)
def test_bad_requests(allocation: object, sparsity: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(allocation, sparsity, {"a.weight": (2, 3), "b.weight": (2, 3)})  # type: ignore[arg-type]


def test_pruning_again_only_removes() -> None:
    shapes = {"a.weight": (10, 10)}
    with pytest.raises(ValueError, match=r"keeps 50 of 100 weights but only 10 are left.*at least 0.9"):
        plan("global", 0.5, shapes, {"a.weight": 10})
    with pytest.raises(ValueError, match=r"'a.weight' would keep 50 weights but has only 10 left"):
        plan({"a": 0.5}, 0.5, shapes, {"a.weight": 10})
    assert plan("global", 0.9, shapes, {"a.weight": 10}).total == 10


def test_any_real_number_is_a_sparsity() -> None:
    for half in (Fraction(1, 2), numpy.float32(0.5), 0.5):
        assert plan("global", half, {"a": (4, 4)}).total == 8  # type: ignore[arg-type]
    assert plan("global", 0, {"a": (4, 4)}).total == 16


def test_no_prunable_weights() -> None:
    with pytest.raises(ValueError, match="the model has no prunable weights"):
        plan("global", 0.5, {})


def test_a_budget_must_add_up() -> None:
    with pytest.raises(ValueError, match="layers sum to 3, total is 4"):
        Budget(4, {"a": 5}, {"a": 3})
    with pytest.raises(ValueError, match="must name the same parameters"):
        Budget(3, {"b": 5}, {"a": 3})
    assert Budget(1, {"a": 4}).density == 0.25


def test_rounds_approach_each_layers_own_target() -> None:
    final = Budget(11, {"a": 10, "b": 100}, {"a": 1, "b": 10})
    halfway = final.towards(lambda target: target**0.5, {"a": 10, "b": 100})
    assert halfway.layers == {"a": 3, "b": 32}  # 10 sqrt(.1) = 3.16, 100 sqrt(.1) = 31.6
    assert final.towards(lambda target: 0.0, {"a": 10, "b": 100}) == final
    assert final.towards(lambda target: 1.0, {"a": 10, "b": 50}).total == 60
    assert Budget(5, {"a": 10}).towards(lambda target: target, {"a": 5}).total == 5


def test_capped_by_room() -> None:
    assert Budget(9, {"a": 10, "b": 10}).capped({"a": 3, "b": 4}).total == 7
    assert Budget(9, {"a": 10, "b": 10}, {"a": 5, "b": 4}).capped({"a": 3, "b": 9}).layers == {"a": 3, "b": 4}
