import pytest
import torch

from fxprune.sparsity import masks

SHAPES = {"a.weight": torch.Size([2, 3]), "b.weight": torch.Size([4])}


def some_masks() -> masks.Masks:
    return {
        "a.weight": torch.tensor([[True, False, True], [False, False, True]]),
        "b.weight": torch.ones(4).bool(),
    }


def test_counts_and_density() -> None:
    assert masks.kept(some_masks()) == {"a.weight": 3, "b.weight": 4}
    assert masks.total(some_masks()) == 7
    assert masks.density(some_masks()) == 0.7
    assert masks.density({}) == 1.0
    assert masks.kept({}) == {}


def test_dense_keeps_everything() -> None:
    full = masks.dense({name: torch.randn(shape) for name, shape in SHAPES.items()})
    masks.validate(full, SHAPES)
    assert masks.density(full) == 1.0


def test_subset() -> None:
    full = {name: torch.ones(shape).bool() for name, shape in SHAPES.items()}
    assert masks.is_subset(some_masks(), full)
    assert not masks.is_subset(full, some_masks())
    assert not masks.is_subset({}, full)


def test_valid_masks_pass_whole_or_in_part() -> None:
    masks.validate(some_masks(), SHAPES)
    masks.validate({"b.weight": torch.ones(4).bool()}, SHAPES, whole=False)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"c.weight": torch.ones(4).bool()},
            ValueError,
            r"no prunable parameter 'c.weight'; there are 'a.weight'",
        ),
        ({"b.weight": torch.ones(4)}, TypeError, r"masks\['b.weight'\] has dtype torch.float32"),
        ({"b.weight": [True] * 4}, TypeError, r"masks\['b.weight'\] is a list"),
        ({"b.weight": torch.ones(5).bool()}, ValueError, r"has shape \(5,\), the parameter has \(4,\)"),
    ],
)
def test_wrong_masks_are_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        masks.validate(some_masks() | change, SHAPES)  # type: ignore[arg-type]


def test_a_missing_mask_is_named() -> None:
    with pytest.raises(ValueError, match=r"nothing given for 'b.weight'"):
        masks.validate({"a.weight": torch.ones(2, 3).bool()}, SHAPES)
