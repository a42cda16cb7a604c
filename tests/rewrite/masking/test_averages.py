"""Averages of a model that is pruned while it trains have its masks, and nothing where these are zero."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxprune.rewrite import finalize, read, set_masks, verify
from rewrite import nets


class ByData:
    """An average as many write it by hand, through ``.data``, which no version counts."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update(self, model):
        for mine, other in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)


class ByStateDict(ByData):
    """An average of floating-point entries of the state dict, in place."""

    def update(self, model):
        state = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.9).add_(state[name].detach(), alpha=0.1)


class Torchs(AveragedModel):
    def update(self, model):
        self.update_parameters(model)


AVERAGES = {
    "data": ByData,
    "state_dict": ByStateDict,
    "AveragedModel": lambda model: Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "buffers": lambda model: Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "buffers, plainly": lambda model: Torchs(
        model, avg_fn=lambda average, now, n: (average * n + now) / (n + 1), use_buffers=True
    ),
    "ModelEmaV2": lambda model: ModelEmaV2(model, decay=0.9),
    "ModelEmaV3": lambda model: ModelEmaV3(model, decay=0.9),
}


def start(density=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    set_masks(model, nets.masks_for(model, density=density))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()


def prune(model, density):
    """Masks within those of now, for random ones of one seed are nested."""
    set_masks(model, nets.masks_for(model, density=density))


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("densities", [(0.1,), (0.6, 0.3, 0.1)])
def test_an_average_gets_the_masks_of_its_model(kind, densities):
    model, optimizer = start()
    average = AVERAGES[kind](model)
    for turn in range(8):
        step(model, optimizer)
        if turn < len(densities):
            prune(model, densities[turn])
        average.update(model)
    masks = read(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in read(average.module).items())
    assert nets.raw_zero(average.module, masks)
    verify(average.module)
    assert any(parameter.count_nonzero() for parameter in average.module.parameters())


def test_weights_that_return_return_in_the_average():
    model, optimizer = start()
    average = AVERAGES["ModelEmaV2"](model)
    for density in (0.1, 0.1, 0.1, 0.5, 0.5):
        step(model, optimizer)
        prune(model, density)
        average.update(model)
    masks = read(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in read(average.module).items())


def test_other_copies_keep_their_masks():
    """A snapshot, one that weights were loaded into or drawn anew for, and one that trains itself."""
    model, optimizer = start(0.5)
    before = read(model)
    snapshot, loaded, redrawn, trained = (copy.deepcopy(model) for _ in range(4))
    other = torch.optim.SGD(trained.parameters(), lr=0.1)
    with torch.no_grad():
        redrawn[0].weight.normal_()
    for density in (0.4, 0.3, 0.2):
        step(model, optimizer)
        step(trained, other)
        loaded.load_state_dict(snapshot.state_dict())
        prune(model, density)
    for twin in (snapshot, loaded, redrawn, trained):
        assert all(torch.equal(mask, before[name]) for name, mask in read(twin).items())


def test_two_trainings_from_one_start_have_an_average_each():
    origin, _ = start()
    runs = []
    for density in (0.3, 0.6):
        model = copy.deepcopy(origin)
        average = AVERAGES["buffers"](model)
        runs.append((model, torch.optim.SGD(model.parameters(), lr=0.1), average, density))
    for _ in range(5):
        for model, optimizer, average, density in runs:
            step(model, optimizer)
            prune(model, density)
            average.update(model)
    for model, _, average, _ in runs:
        masks = read(model)
        assert all(torch.equal(mask, masks[name]) for name, mask in read(average.module).items())


def test_verify_sees_a_mask_that_was_averaged():
    model, _ = start()
    average = copy.deepcopy(model)
    prune(model, 0.3)
    with torch.no_grad():
        average[0].weight_mask.copy_(average[0].weight_mask * 0.9 + model[0].weight_mask * 0.1)
    with pytest.raises(RuntimeError, match=r"0\.weight: its mask was overwritten"):
        verify(average)
    set_masks(average, read(model))
    verify(average)
    average[0]._buffers["weight_mask"] = average[0].weight_mask.float() * 0.5
    with pytest.raises(RuntimeError, match=r"0\.weight .*does not fit its mask"):
        verify(average)


def test_finalize_trusts_masks_and_not_the_storage():
    model, _ = start(0.3)
    masks = read(model)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    x = torch.randn(4, 8)
    final = finalize(model)
    assert nets.raw_zero(final, masks)
    assert torch.equal(final(x), model(x))
    assert not nets.raw_zero(model, masks), "the caller's storage is left alone"


COMPUTED = {
    "parametrized": nn.utils.parametrizations.weight_norm,
    "hooked": nn.utils.weight_norm,
    "hooked, spectral": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("form", COMPUTED)
def test_an_average_gets_the_masks_of_weights_that_are_computed(kind, form):
    torch.manual_seed(0)
    first = COMPUTED[form](nn.Linear(8, 16))
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 4))
    shapes = {"0.weight": (16, 8), "2.weight": (4, 16)}
    chances = {name: torch.rand(shape) for name, shape in shapes.items()}
    set_masks(model, {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average, snapshot, loaded = AVERAGES[kind](model), copy.deepcopy(model), copy.deepcopy(model)
    for turn in range(8):
        step(model, optimizer)
        loaded.load_state_dict(snapshot.state_dict())
        if turn < 3:
            set_masks(model, {name: chance < 0.7 - 0.2 * turn for name, chance in chances.items()})
        average.update(model)
    masks, weights = read(model), dict(finalize(average.module).named_parameters())
    for name, mask in masks.items():
        assert torch.equal(read(average.module)[name], mask)
        assert torch.equal(weights[name] != 0, mask), "and all that is kept is there"
        assert read(snapshot)[name].all(), "nobody wrote to it"
        assert read(loaded)[name].all(), "its weights were loaded"
