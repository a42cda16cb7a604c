"""Evaluation and recalibration against the same numbers computed in another way."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scoring.processes import together
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import fxprune


def nets(classes: int = 5) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one, two = nn.Linear(4, classes), nn.Linear(4, classes)
    return nn.Sequential(one, nn.Dropout()), nn.Sequential(two)


def test_a_classifier() -> None:
    model, dense = nets()
    x, y = torch.randn(30, 4), torch.randint(5, (30,))
    y[:3] = -100
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]
    found = fxprune.evaluate(model, parts, dense)
    own, other = model[0](x)[3:].detach(), dense(x)[3:].detach()
    assert found.positions == 27
    assert found.loss == pytest.approx(float(cross_entropy(own, y[3:])), rel=1e-5)
    assert found.perplexity == pytest.approx(float(cross_entropy(own, y[3:]).exp()), rel=1e-5)
    assert found.agreement == pytest.approx(float((own.argmax(1) == other.argmax(1)).float().mean()))
    wanted = kl_div(own.log_softmax(1), other.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(wanted), rel=1e-5)
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_pixels_and_tokens_find_their_classes() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 6)
    labels = torch.randint(5, (2, 4, 6))
    found = fxprune.evaluate(conv, (x, labels), conv)
    assert found.positions == 48
    assert found.loss == pytest.approx(float(cross_entropy(conv(x), labels).detach()), rel=1e-5)
    tokens, table = torch.randint(7, (2, 6)), nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 9))
    labels = torch.randint(9, (2, 6))
    found = fxprune.evaluate(table, (tokens, labels))
    assert found.loss == pytest.approx(
        float(cross_entropy(table(tokens).flatten(0, 1), labels.flatten()).detach()), rel=1e-5
    )


@dataclass
class Output:
    """Outputs by name, as of transformers."""

    logits: Tensor
    loss: Tensor | None = None


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.table(input_ids))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits, loss)


def test_outputs_by_name_and_dict_batches() -> None:
    torch.manual_seed(0)
    model, dense = Language(), Language()
    ids, mask = torch.randint(7, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    found = fxprune.evaluate(model, [batch], dense)
    own, other = model(ids, mask).logits[mask.bool()], dense(ids, mask).logits[mask.bool()]
    assert found.positions == 13
    assert found.agreement == pytest.approx(float((own.argmax(1) == other.argmax(1)).float().mean()))
    assert found.loss == pytest.approx(float(model(**batch).loss.detach()))

    def loss_fn(network: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return network(one["words"], torch.ones_like(one["words"])).logits.square().mean()  # type: ignore[no-any-return]

    found = fxprune.evaluate(model, {"words": ids}, dense, loss_fn)
    assert found.loss == pytest.approx(float(model(ids, mask).logits.detach().square().mean()))
    assert found.positions == 15


def test_what_cannot_be_compared_is_told_of() -> None:
    model, dense = nets()
    x = torch.randn(6, 4)
    with pytest.raises(
        ValueError, match=r"reference: its logits have the shape \(6, 3\), the model's \(6, 5\)"
    ):
        fxprune.evaluate(model, (x, torch.zeros(1)), nets(3)[1])
    with pytest.raises(ValueError, match="needs data="):
        fxprune.evaluate(model, None)
    with pytest.raises(ValueError, match="data: it yields no batch"):
        fxprune.evaluate(model, [])
    with pytest.raises(TypeError, match="model: returns a dict, expected logits"):
        fxprune.evaluate(Dict(), (x, torch.zeros(1)))
    broken = copy.deepcopy(dense)
    broken[0].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="model: its logits are NaN"):
        fxprune.evaluate(broken, (x, torch.zeros(1)))
    with pytest.raises(ValueError, match="tokens of data run from 9 to 9, but embedding 'table' has 7 rows"):
        fxprune.evaluate(Language(), {"input_ids": torch.tensor([[9]]), "attention_mask": torch.ones(1, 1)})


class Dict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(), nn.BatchNorm2d(4))


def test_recalibrated_statistics_are_the_means_of_the_batches() -> None:
    model = normed()
    model(torch.randn(8, 3, 6, 6))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    batches: list[Any] = [(torch.randn(size, 3, 6, 6) + size, torch.zeros(size)) for size in (4, 7, 2)]
    random = torch.get_rng_state()
    found = fxprune.recalibrate(model, batches)
    assert torch.equal(random, torch.get_rng_state())
    first = [model[0](x).detach() for x, _ in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in first]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in first]).mean(0)
    assert torch.allclose(found[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(found[1].running_var, variance, atol=1e-5)
    # The second sees what the first gives in training, without dropout.
    second = [nn.functional.batch_norm(y, None, None, model[1].weight, model[1].bias, True) for y in first]
    variance = torch.stack([y.detach().var((0, 2, 3)) for y in second]).mean(0)
    assert torch.allclose(found[3].running_var, variance, atol=1e-5)
    assert found[1].momentum == 0.3
    assert [module.training for module in found] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), found.parameters(), strict=True))


def test_a_masked_graph_is_recalibrated() -> None:
    model, x = normed(), torch.randn(8, 3, 6, 6)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    found = fxprune.recalibrate(pruned, (x, torch.zeros(8)))
    fxprune.verify(found)
    y = fxprune.finalize(pruned).get_submodule("0")(x)
    assert torch.allclose(found.get_buffer("1.running_mean"), y.mean((0, 2, 3)), atol=1e-5)


def test_what_is_no_network_is_named() -> None:
    batch: Any = (torch.ones(1, 2), torch.zeros(1))
    for call in (fxprune.evaluate, fxprune.recalibrate):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got the class Linear"):
            call(nn.Linear, batch)  # type: ignore[operator]
    with pytest.raises(TypeError, match="reference: expected"):
        fxprune.evaluate(nn.Linear(2, 2), batch, reference=3)  # type: ignore[arg-type]


def test_labels_that_give_no_loss_are_told_of() -> None:
    model, dense = nets()
    x = torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=r"data: labels of shape \(3,\) from 7 to 9 do not fit logits of shape \(3, 5\)"
    ):
        fxprune.evaluate(model, (x, torch.tensor([7, 8, 9])))
    with pytest.raises(
        ValueError, match=r"labels of shape \(3,\) from 0 to 0 do not fit.*loss_fn= or reference="
    ):
        fxprune.evaluate(model, (x, torch.zeros(3)))
    assert fxprune.evaluate(model, (x, torch.zeros(3)), dense).loss is None


def test_nothing_to_recalibrate_is_told_of() -> None:
    with pytest.raises(ValueError, match="it has no batch norm with running statistics"):
        fxprune.recalibrate(nets()[0], (torch.ones(2, 4), torch.ones(2)))
    with pytest.raises(ValueError, match="data: it yields no batch"):
        fxprune.recalibrate(normed(), [])


def batches_of(ranks: range) -> list[Any]:
    """Three batches of the first process and one of the second; none of a third."""
    generator = torch.Generator().manual_seed(0)
    sizes = {0: (4, 7, 2), 1: (6,), 2: ()}
    drawn = {r: [torch.randn(n, 3, 6, 6, generator=generator) + n for n in sizes[r]] for r in sizes}
    return [(x, torch.zeros(len(x))) for rank in ranks for x in drawn[rank]]


def recalibrated_with_others(rank: int) -> dict[str, Tensor]:
    return dict(fxprune.recalibrate(normed(), batches_of(range(rank, rank + 1))).named_buffers())


@pytest.mark.slow
def test_processes_recalibrate_together() -> None:
    every = together(3, recalibrated_with_others)
    wanted = dict(fxprune.recalibrate(normed(), batches_of(range(3))).named_buffers())
    for found in every:
        assert not isinstance(found, Exception)
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
