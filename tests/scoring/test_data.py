from collections.abc import Iterator
from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune import methods
from fxprune.scoring.data import batches
from fxprune.sparsity.masks import total

X = torch.arange(12.0).view(6, 2) / 12
Y = torch.tensor([0, 1, 2, 0, 1, 2])
PAIRS = [(X[:3], Y[:3]), (X[3:], Y[3:])]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))


def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from PAIRS


@pytest.mark.parametrize(
    ("data", "first"),
    [
        ((X, Y), X),
        ([X, Y], X),
        (PAIRS, X[:3]),
        (tuple(PAIRS), X[:3]),
        (DataLoader(TensorDataset(X, Y), batch_size=3), X[:3]),
        (stream(), X[:3]),
        ([[X, Y]], X),
    ],
)
def test_forms_of_data(data: Any, first: torch.Tensor) -> None:
    batch = batches(problem(net(), data=data), 1, "mine")[0]
    assert torch.equal(batch.inputs, first)
    assert torch.equal(batch.target, Y[: len(first)])


def test_several_batches_in_order() -> None:
    found = batches(problem(net(), data=PAIRS), 2, "mine")
    assert [torch.equal(batch.inputs, x) for batch, (x, _) in zip(found, PAIRS, strict=True)] == [True, True]


def test_no_more_is_read_than_asked_for() -> None:
    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield PAIRS[0]
        raise AssertionError("read on")

    assert len(batches(problem(net(), data=endless()), 1, "mine")) == 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 3)
        self.right = nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) + self.right(right)


def mapping_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["a"], batch["b"]), batch["labels"])


@pytest.mark.parametrize(
    ("data", "loss_fn"),
    [
        (((X, 2 * X), Y), None),
        ([((X, 2 * X), Y)], None),
        (({"left": X, "right": 2 * X}, Y), None),
        ({"a": X, "b": 2 * X, "labels": Y}, mapping_loss),
        ([{"a": X, "b": 2 * X, "labels": Y}], mapping_loss),
    ],
)
def test_several_inputs_and_mappings_give_the_same_masks(data: Any, loss_fn: Any) -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    masks = methods.get("snip").find(problem(model, 0.5, data=data, loss_fn=loss_fn))
    nn.functional.cross_entropy(model(X, 2 * X), Y).backward()
    gradients = [p.grad for p in (model.left.weight, model.right.weight)]
    scores = torch.cat(
        [
            (p * g).abs().flatten()
            for p, g in zip((model.left.weight, model.right.weight), gradients, strict=True)
        ]
    )
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), scores >= scores.sort().values[6])


def test_a_loss_on_mappings_sees_the_masked_weights() -> None:
    seen = []

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        seen.append(dict(model.named_parameters())["left.weight"])
        return mapping_loss(model, batch)

    data = {"a": X, "b": X, "labels": Y}
    model = TwoInputs()
    start = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in problem(model).weights.items()}
    start["right.weight"][:] = True
    methods.get("snip").find(problem(model, 0.75, data=data, loss_fn=loss_fn, masks=start))
    assert not seen[0].any()
    assert model.left.weight.any()


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, ValueError, r"method 'snip' needs data=\.\.\."),
        ([], ValueError, "method 'snip': data yields no batch"),
        (PAIRS[:1], ValueError, "data ran dry after 1 of 2 batches; give more, or ask for batches=1"),
        ((X, Y), ValueError, "data ran dry after 1 of 2 batches"),
        (
            [(X[:0], Y[:0]), *PAIRS],
            ValueError,
            r"batch 0 of data is empty: it has a tensor of shape \(0, 2\)",
        ),
        ([PAIRS[0], (X * float("nan"), Y)], ValueError, "batch 1 of data holds NaN or infinite inputs"),
        ([{"x": X * float("inf"), "y": Y}] * 2, ValueError, "batch 0 of data holds NaN or infinite inputs"),
        ([X, X], ValueError, "targets of shape"),
        ([X, X, X], ValueError, "data hold no labels, and the loss is cross entropy"),
        ([(X, Y, Y)] * 2, ValueError, "batch 0 of data is a tuple of 3, expected a pair"),
        (X, ValueError, "data ran dry after 1 of 2 batches"),
        (3, TypeError, "data is a int, expected a pair"),
        ([(X, Y + 1), (X, Y)], ValueError, "labels from 1 to 3, but the model has 3 outputs"),
        ([(X, Y - 1), (X, Y)], ValueError, "labels from -1 to 1, but the model has 3 outputs"),
        ([(X, Y[:4])] * 2, ValueError, r"targets of shape \(4,\) do not fit outputs of shape \(6, 3\)"),
        ([(X, None)] * 2, ValueError, "data hold no labels"),
        ([{"x": X, "y": Y}] * 2, ValueError, r"mapping batches need loss_fn=\.\.\."),
    ],
)
def test_bad_data(data: Any, error: type[Exception], words: str) -> None:
    wanted = 1 if isinstance(data, list) and data and data[0] is X and len(data) == 2 else 2
    with pytest.raises(error, match=words):
        methods.get("snip", batches=wanted).find(problem(net(), data=data))


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda output, target: output, r"loss_fn returned a tensor \(6, 3\), expected a scalar tensor"),
        (lambda output, target: 1.0, "loss_fn returned a float, expected a scalar tensor"),
        (lambda output, target: output.detach().sum(), "the loss does not depend on the model's weights"),
        (lambda output, target: output.sum() * float("inf"), "the loss is -?inf; scores need a finite one"),
    ],
)
def test_bad_losses(loss_fn: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        methods.get("snip").find(problem(net(), data=(X, Y), loss_fn=loss_fn))


def test_outputs_that_are_no_tensor_need_a_loss() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.fc(x), x

    with pytest.raises(TypeError, match=r"the model returns a tuple, .* pass loss_fn"):
        methods.get("snip").find(problem(Pair(), data=(X, Y)))
    asked = problem(Pair(), data=(X, Y), loss_fn=lambda out, y: nn.functional.cross_entropy(out[0], y))
    assert total(methods.get("snip").find(asked)) == 3


@pytest.mark.parametrize(
    "target",
    [
        Y.int(),
        torch.tensor([0, 1, -100, 0, 1, 2]),
        torch.full((6,), -100),
        torch.eye(3)[Y],
    ],
    ids=["int32", "ignored label", "all ignored", "probabilities"],
)
def test_targets_of_the_default_loss(target: torch.Tensor) -> None:
    asked = problem(net(), data=(X, target))
    if (target == -100).all():
        with pytest.raises(ValueError, match="the loss is nan"):
            methods.get("snip").find(asked)
    else:
        assert total(methods.get("snip").find(asked)) == asked.budget.total


def test_an_iterator_cannot_serve_a_second_round() -> None:
    asked = problem(net(), data=stream(), schedule="linear(2)")
    with pytest.raises(ValueError, match="data yields no batch any more; an iterator can be read only once"):
        methods.get("snip", batches=2).find(asked)
