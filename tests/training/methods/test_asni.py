"""ASNI: its curve, the sparsities of the paper, centroids, the three initialisations, tickets."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.rewrite import read_header, read_ticket
from fxprune.sparsity.budget import count
from fxprune.training import Pruner
from fxprune.training.methods.asni import asni, fraction_pruned
from training import nets

# Table 2 of the paper beside table 1: alpha, gamma, epochs, all parameters, those that are not pruned (biases
# and norms), the sparsity as printed, nonzeros as printed, hold, and whether the sparsity is that of all
# parameters. Printed sparsities that contradict the nonzeros beside them are replaced: Conv2 on MNIST has
# 98.18 for 97.40.
TABLE_2 = {
    "MNIST FC": (0.98, 5, 50, 266_610, 410, 96.87, 8_335, 2, True),
    "MNIST Conv2": (0.992, 2, 20, 3_317_450, 650, 97.40, 86_363, 2, True),
    "MNIST Conv4": (0.985, 2, 25, 1_933_258, 906, 97.94, 39_828, 2, True),
    "MNIST Conv6": (0.985, 3, 30, 1_802_698, 1_418, 97.15, 51_420, 2, True),
    "CIFAR Conv2": (0.985, 2, 20, 4_301_642, 650, 96.71, 141_364, 2, True),
    "CIFAR Conv4": (0.95, 2, 25, 2_425_930, 906, 94.47, 134_185, 2, True),
    "CIFAR Conv6": (0.94, 3, 30, 2_262_602, 1_418, 92.72, 164_624, 2, True),
    "CIFAR VGG-11": (0.97, 16, 160, 9_231_114, 8_266, 96.14, 356_230, 2, True),
    "CIFAR VGG-13": (0.98, 16, 160, 9_416_010, 8_842, 97.14, 269_221, 2, True),
    "CIFAR VGG-16": (0.99, 16, 160, 14_728_266, 12_682, 98.15, 272_626, 2, True),
    "CIFAR ResNet-18": (0.97, 16, 160, 11_181_642, 9_610, 96.14, None, 2, True),
    "ImageNet ResNet-50 80": (0.8104, 10, 90, 25_557_032, 54_120, 80.12, None, 0, False),
    "ImageNet ResNet-50 90": (0.9105, 10, 90, 25_557_032, 54_120, 90.08, None, 0, False),
}


@pytest.mark.parametrize("row", TABLE_2)
def test_table_2(row: str) -> None:
    alpha, gamma, epochs, parameters, others, printed, nonzeros, hold, over_all = TABLE_2[row]
    method = asni(None, epochs, alpha=alpha, gamma=float(gamma), hold=hold)
    prunable = parameters - others
    left = count(prunable, 1 - method.target)
    sparsity = 1 - (left + others) / parameters if over_all else 1 - left / prunable
    assert 100 * sparsity == pytest.approx(printed, abs=0.1)
    if nonzeros is not None and "VGG" not in row:
        assert left + others == pytest.approx(nonzeros, abs=10)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer collapse")
def test_a_whole_run_on_the_papers_smallest_network() -> None:
    pruner = Pruner(
        lenet(), total=50, alpha=0.98, beta=0.5, gamma=5.0, hold=2, example_inputs=torch.ones(1, 1, 28, 28)
    )
    before = pruner.masks
    for epoch in range(1, 51):
        pruner.step(epoch)
        after = pruner.masks
        assert all(bool((before[name] | ~mask).all()) for name, mask in after.items()), "nothing returns"
        before = after
    wanted = [count(266_200, 1 - fraction_pruned(min(e, 48), 50, 0.98, 0.5, 5.0)) for e in range(1, 51)]
    assert [event.kept for event in pruner.history] == wanted[:48]
    assert pruner.sparsity == 1 - wanted[-1] / 266_200
    nonzero = sum(int(p.count_nonzero()) for p in pruner.model.parameters())
    assert 100 * (1 - nonzero / 266_610) == pytest.approx(96.87, abs=0.1)


def test_one_threshold_over_all_layers() -> None:
    pruner = Pruner(nets.mlp(), total=4, alpha=0.9, gamma=1.0, example_inputs=nets.X)
    sizes = torch.cat([pruner.model.get_parameter(name).abs().flatten() for name in pruner.masks])
    pruner.step(2)  # 45 %
    left = count(len(sizes), 1 - 0.45)
    threshold = sizes.sort(descending=True).values[left - 1]
    for name, mask in pruner.masks.items():
        weight = pruner.model.get_parameter(name)
        assert torch.equal(mask, weight.abs() >= threshold)
        assert (weight[~mask] == 0).all()
    for name, parameter in nets.mlp().named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, pruner.model.get_parameter(name))


def test_the_curve() -> None:
    curve = [100 * fraction_pruned(e, 4, 0.9, 0.5, 1.0) for e in range(1, 5)]
    assert curve == pytest.approx([24.20, 45.00, 65.80, 79.27], abs=0.005)
    assert 0.003 <= fraction_pruned(1, 50, 0.98, 0.5, 5.0) <= 0.011
    assert fraction_pruned(1, 10**6, 0.9, 0.5, 0.1) == pytest.approx(0, abs=1e-12)


def test_a_sparsity_decides_alpha() -> None:
    assert asni(0.9, 20, gamma=2.0).target == pytest.approx(0.9)
    assert asni(None, 20).target == pytest.approx(0.98 / (1 + math.exp(-5)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 98}, "alpha=98.*0.98"),
        ({"alpha": 0.9, "sparsity": 0.8}, "give one of them"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"hold": 5}, "hold=5"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"total": 0}, "total=0"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pruner(nets.mlp(), **{"total": 5, "example_inputs": nets.X, **options})


def trained(**options: Any) -> Pruner:
    pruner = Pruner(
        nets.normed(), total=3, alpha=0.8, gamma=0.5, example_inputs=nets.IMAGES, rewind=1, **options
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, 4):
        for step in range(3):
            x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(10 * epoch + step))
            optimizer.zero_grad()
            pruner.model(x).square().mean().backward()
            optimizer.step()
        pruner.step(epoch)
    return pruner


def test_centroids_by_hand() -> None:
    pruner = trained()
    found = pruner.centroids()
    assert list(found) == list(pruner.masks)
    for name, (negative, positive) in found.items():
        weight = pruner.model.get_parameter(name).detach().double()
        assert negative == pytest.approx(float(weight[weight < 0].mean()), rel=1e-6)
        assert positive == pytest.approx(float(weight[weight > 0].mean()), rel=1e-6)


def test_centroids_initialise() -> None:
    pruner = trained()
    before = {name: parameter.detach().clone() for name, parameter in pruner.model.named_parameters()}
    values = pruner.centroids()
    model: Any = pruner.reinitialize("centroids")
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name)
        signs = before[name].sign()
        negative, positive = values[name]
        assert torch.equal(weight, torch.where(signs < 0, negative, positive) * mask)
        assert (weight[~mask] == 0).all()
        assert len(weight.unique()) <= 3
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if name in ("1.weight", "5.weight"):
            assert (parameter == 1).all(), name
    assert torch.equal(model.get_parameter("2.weight"), before["2.weight"]), "slopes of PReLU are no norm's"
    norm = model.get_submodule("1")
    assert not norm.running_mean.any()
    assert (norm.running_var == 1).all()
    assert pruner.centroids() == values, "the means of the centroids are the centroids"
    fxprune.verify(model)


def test_original_and_rewound() -> None:
    pruner = trained()
    original = nets.normed()
    kept_at_1 = pruner.state_dict()["kept"][1]
    model = pruner.reinitialize("original")
    for name, parameter in original.named_parameters():
        mask = pruner.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(model.get_parameter(name), parameter * mask), name
    pruner.reinitialize("rewind:1")
    for name, parameter in model.named_parameters():
        mask = pruner.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, kept_at_1[name] * mask), name
    for word in ("rewind:2", "dense", "rewind:", "rewind:x"):
        with pytest.raises(ValueError, match="start="):
            pruner.reinitialize(word)


def test_masks_stay_through_training_from_centroids() -> None:
    pruner = trained()
    masks = pruner.masks
    model = pruner.reinitialize("centroids")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    fxprune.verify(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(model).items())


def test_a_ticket_rebuilds_the_network(tmp_path: Any) -> None:
    pruner = trained()
    path = tmp_path / "ticket.safetensors"
    fxprune.save(pruner.model, path, form="ticket")
    wanted = pruner.reinitialize("centroids")
    stranger = nets.normed(seed=5)
    stranger.get_submodule("2").load_state_dict({"weight": pruner.model.get_parameter("2.weight").detach()})
    again = fxprune.load_ticket(path, stranger, example_inputs=nets.IMAGES)
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert {k: v.tolist() for k, v in fxprune.load_masks(path).items()} == {
        k: v.tolist() for k, v in pruner.masks.items()
    }
    header = read_header(path)
    assert (header["form"], header["method"]) == ("ticket", "asni")
    fxprune.save(wanted, tmp_path / "again", form="ticket")
    once, twice = (str(read_ticket(file)) for file in (path, tmp_path / "again"))
    assert once == twice, "as good after as before"


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_a_ticket_is_bits_and_two_numbers_a_layer(tmp_path: Any) -> None:
    pruner = Pruner(lenet(), total=1, alpha=0.97, gamma=0.01, example_inputs=torch.ones(1, 1, 28, 28))
    pruner.step(1)
    for form in ("masks", "ticket"):
        fxprune.save(pruner.model, tmp_path / form, form=form)
    extra = (tmp_path / "ticket").stat().st_size - (tmp_path / "masks").stat().st_size
    kept = round(266_200 * (1 - pruner.sparsity))
    assert extra <= 2 * 4 * 3 + kept / 8 + 400  # 400 bytes of names in the header
    assert (tmp_path / "ticket").stat().st_size < 266_200 / 8 + kept / 8 + 24 + 1500


def test_broken_tickets(tmp_path: Any) -> None:
    pruner = trained()
    with pytest.raises(ValueError, match="form='bits'"):
        fxprune.save(pruner.model, tmp_path / "x", form="bits")  # type: ignore[arg-type]
    fxprune.save(pruner.model, tmp_path / "masks", form="masks")
    with pytest.raises(ValueError, match="not a ticket"):
        fxprune.load_ticket(tmp_path / "masks", nets.normed(), example_inputs=nets.IMAGES)
    fxprune.save(pruner.model, tmp_path / "ticket", form="ticket")
    with pytest.raises(ValueError, match="masks"):
        fxprune.load_ticket(tmp_path / "ticket", nets.mlp(), example_inputs=nets.X)
    (tmp_path / "cut").write_bytes((tmp_path / "ticket").read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a readable"):
        fxprune.load_ticket(tmp_path / "cut", nets.normed(), example_inputs=nets.IMAGES)
