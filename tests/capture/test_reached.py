"""The inside of a part that stays whole is looked at where there is something to do."""

import random
from typing import Any

import pytest
import torch
from thinning import one_in
from torch import Tensor, nn

import fxprune
from capture.faithful import assert_same_training
from fxprune.capture import CaptureError, capture_own


class Experts(nn.Module):
    """Rows go to the expert that is best for them; an expert without any is passed over."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.ask = ask
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if self.ask(mask):
                out[mask] = expert(x[mask])
        return out


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.out = nn.Linear(8, 8), part, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.part(self.stem(x)))
        return out


QUESTIONS = {
    "any": lambda mask: mask.any(),
    "torch.any": lambda mask: torch.any(mask).item(),
    "numel": lambda mask: mask.nonzero().numel() > 0,
    "length": lambda mask: not mask.nonzero().shape[0] == 0,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("name", one_in(4, QUESTIONS))
def test_experts_that_may_have_nothing_to_do_are_prunable(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(Experts(QUESTIONS[name])), torch.randn(16, 8)
    gm = fxprune.capture(net, x)
    # Whole: rows may all go to one expert, and the others are passed over.
    rows = x[:1].expand(4, -1)
    assert torch.allclose(gm.eval()(rows), net.eval()(rows), atol=1e-6)
    graph = fxprune.lower(gm)
    assert {f"part.experts.{i}.{j}.weight" for i in range(3) for j in (0, 2)} < set(graph.kernels)
    pruned = fxprune.apply(net, "synflow", 0.7, example_inputs=x, progress=False)
    assert all(
        0 < mask.float().mean() < 1 for name, mask in fxprune.masks(pruned).items() if "experts" in name
    )
    pruned.train()(x).sum().backward()
    torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9).step()
    fxprune.verify(pruned)


class LayerDrop(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw, self.layers = draw, nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            number = self.draw()
            if self.training and number < 0.5:
                continue
            x = x + layer(x).relu()
        return x


@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1).item()])
def test_layers_that_are_dropped_at_random_are_prunable(draw: Any) -> None:
    torch.manual_seed(0)
    net, x = Net(LayerDrop(draw)), torch.randn(16, 8)
    graph = fxprune.lower(fxprune.capture(net, x))
    assert len(graph.kernels) == 5
    assert not graph.opaque


class Choosing(LayerDrop):
    """Drops layers in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.draw() > 0.5:
                x = x + layer(x).relu()
        return x


@pytest.mark.filterwarnings("ignore:capture")
def test_a_part_that_a_random_number_of_python_decides_is_opaque() -> None:
    graph = fxprune.lower(fxprune.capture(Net(Choosing(random.random)), torch.randn(16, 8)))
    assert len(graph.opaque) == 1


@pytest.mark.filterwarnings("ignore:capture")
def test_layers_that_a_tensor_lets_pass_or_not_have_paths() -> None:
    """All that happens without them happens with them, too."""
    net = Net(Choosing(lambda: torch.rand(1).item()))
    graph = fxprune.lower(fxprune.capture(net, torch.randn(16, 8)))
    assert not graph.opaque
    assert len(graph.kernels) == 5


class Mixed(nn.Module):
    """Mixes its rows by shares from a distribution that PyTorch has no shapes for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            share = torch.distributions.Beta(0.4, 0.4).sample((x.size(0), 1))
            x = share * x + (1 - share) * x.flip(0)
        out: Tensor = self.layer(x)
        return out


def test_random_numbers_that_have_no_shapes_are_part_of_training() -> None:
    net = Mixed()
    gm = fxprune.capture(net, torch.randn(4, 8))
    assert_same_training(gm, net, (8,))


class Masked(nn.Conv2d):
    """Sees what is above and to the left, as in PixelCNN: the weight is masked in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 2:], self.mask[:, :, 2] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def test_weights_that_a_layer_masks_in_place_are_prunable() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Masked(1, 6), nn.ReLU(), Masked(6, 2)), torch.randn(2, 1, 6, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = fxprune.lower(fxprune.capture(net, x))
    assert list(graph.kernels) == ["0.weight", "2.weight"]
    assert not graph.opaque
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=x, progress=False)
    pruned.train()(x).sum().backward()
    torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9).step()
    pruned(x)
    fxprune.verify(pruned)


class Assigning(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x.data = x.data.clamp(-1, 1)
        return x


def test_other_data_that_is_assigned_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"assigns the \.data"):
        capture_own(Assigning(), torch.randn(2, 8))
