"""``int(...)`` of sizes: as swin transformers count their windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune import apply, capture, compact


def merged(windows: Tensor, size: int, height: int) -> Tensor:
    batch = int(windows.shape[0] / (height * height / size / size))
    x = windows.view(batch, height // size, height // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, height, -1)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, _, channels = x.shape
        windows = x.view(batch, height // 2, 2, height // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        hidden = self.up(windows.reshape(-1, 4, channels)).relu()
        return x + merged(self.down(hidden), 2, height)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.windows, self.head = nn.Linear(4, 6), Windows(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.windows(self.stem(x)))


def test_whole_numbers_of_sizes_follow_the_batch() -> None:
    torch.manual_seed(0)
    for model, width in ((Windows(), 6), (Around(), 4)):
        gm = capture(model, torch.ones(2, 4, 4, width))
        assert "windows" not in [str(node.target) for node in gm.graph.nodes]
        for batch in (1, 2, 5):
            x = torch.randn(batch, 4, 4, width)
            assert torch.equal(gm(x), model(x))
    assert "int" not in globals()


@pytest.mark.slow
def test_channels_go_beside_whole_numbers_of_sizes() -> None:
    torch.manual_seed(0)
    pruned = apply(Around(), "magnitude", 0.5, granularity="channel", example_inputs=torch.ones(2, 4, 4, 4))
    small = compact(pruned.eval(), example_inputs=torch.ones(2, 4, 4, 4))
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in pruned.parameters())
    x = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(small(x), pruned(x))


class Asks(nn.Module):
    """Asks what its numbers are, in code that makes whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = int(x.shape[0] / 2) * 2
        assert isinstance(count, int)
        assert isinstance(3, (int, float))
        assert type(len("name")) == int  # noqa: E721
        assert issubclass(bool, int)
        assert int("7") + int.from_bytes(b"a", "big") == 104
        return self.layer(x).view(count, 4)


def test_the_name_means_what_it_meant() -> None:
    model = Asks()
    gm = capture(model, torch.ones(2, 4))
    x = torch.randn(6, 4)
    assert torch.equal(gm(x), model(x))


class Refuses(nn.Module):
    """Hands the name to code of PyTorch, which knows ``int`` itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = int(x.shape[0] / 2) * 2
        return self.layer(x).view(count, 4) + torch.ones(4).to(int)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Refuses()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_code_that_needs_the_name_itself_runs_as_before() -> None:
    model = Outer()
    with pytest.warns(UserWarning, match="kept whole: an argument of type type"):
        gm = capture(model, torch.ones(2, 4))
    x = torch.randn(6, 4)
    assert torch.equal(gm(x), model(x))


class Chooses(nn.Module):
    """Goes another way where the name is not ``int`` itself: always, or in training alone."""

    def __init__(self, *, in_training: bool) -> None:
        super().__init__()
        self.layer, self.in_training, self.factor = nn.Linear(4, 4), in_training, 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).view(int(x.shape[0]), 4)
        if self.training or not self.in_training:
            return y * 2 if type(self.factor) is int else y
        return y


@pytest.mark.parametrize("in_training", [False, True])
def test_code_that_tells_the_name_from_its_stand_in_goes_its_own_way(in_training: bool) -> None:
    model = Chooses(in_training=in_training)
    with pytest.warns(UserWarning, match="a Python number of the batch size"):
        gm = capture(model, torch.ones(2, 4))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        assert torch.equal(gm.train(training)(x), model.train(training)(x))


class Half(nn.Module):
    """Takes half of the batch, whole samples; two batch sizes that follow each other have one half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.k = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        half = int(x.shape[0] * 0.5)
        return self.layer(x)[:half]


class TellsHalf(Half):
    """As before, in code that can tell what stands for ``int``."""

    def forward(self, x: Tensor) -> Tensor:
        half = int(x.shape[0] * 0.5)
        return self.layer(x)[:half] * (2 if type(self.k) is int else 3)


def test_whole_parts_of_fractions_of_the_batch_follow_it() -> None:
    torch.manual_seed(0)
    model = Half()
    for size in (4, 5):
        gm = capture(model, torch.ones(size, 4))
        for batch in (1, 3, 4, 6, 9):
            x = torch.randn(batch, 4)
            assert torch.equal(gm(x), model(x))


def test_whole_parts_of_fractions_that_cannot_be_followed_fix_the_batch_size() -> None:
    torch.manual_seed(0)
    model = TellsHalf()
    with pytest.warns(UserWarning, match="holds for the batch size of example_inputs"):
        gm = capture(model, torch.ones(4, 4))
    x = torch.randn(4, 4)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(AssertionError, match="TellsHalf"):
        gm(torch.randn(6, 4))
