"""The networks that papers on pruning measure on.

A number of classes comes in; a freshly initialised network goes out (Kaiming normal weights, zero biases).
Parameter counts are those of the papers: they are tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["conv2", "conv4", "conv6", "lenet_300_100", "resnet18_tiny", "resnet20", "vgg19_bn"]

VGG19_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)
"""Widths of VGG-19's convolutions, zero for a max-pool of 2 x 2."""


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for images of 3 x 32 x 32, with 1 x 1 convolutions as projection shortcuts.

    272,474 parameters, of which 270,896 in 22 prunable tensors (He et al. 2016, arXiv 1512.03385, section
    4.2, with shortcuts of type B).

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    return _initialised(_ResNet((16, 32, 64), blocks=3, classes=classes, has_bias=True))


def vgg19_bn(classes: int = 100) -> nn.Module:
    """VGG-19 with batch norm for images of 3 x 32 x 32: one linear layer after an average pool of 2 x 2.

    20,086,692 parameters, of which 20,070,080 in 17 prunable tensors (Simonyan, Zisserman 2015, arXiv
    1409.1556, configuration E; the head is that of SynFlow, arXiv 2006.05467). The last max-pool is the
    average.

    >>> sum(p.numel() for p in vgg19_bn().parameters())
    20086692
    """
    return _initialised(_VGG(VGG19_WIDTHS, classes))


def resnet18_tiny(classes: int = 200) -> nn.Module:
    """ResNet-18 for images of 3 x 64 x 64 (Tiny-ImageNet): a 3 x 3 stem, no max-pool, no bias in the head.

    11,271,232 parameters, of which 11,261,632 in 21 prunable tensors (the version of SynFlow, arXiv
    2006.05467).

    >>> sum(p.numel() for p in resnet18_tiny().parameters())
    11271232
    """
    return _initialised(_ResNet((64, 128, 256, 512), blocks=2, classes=classes, has_bias=False))


def lenet_300_100(classes: int = 10, inputs: int = 784) -> nn.Module:
    """LeNet-300-100: three linear layers on flattened images of ``inputs`` numbers (LeCun et al. 1998).

    266,610 parameters for MNIST, the "FC" of the lottery ticket papers.

    >>> sum(p.numel() for p in lenet_300_100().parameters())
    266610
    """
    return _initialised(
        nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
            nn.Linear(100, classes),
        )
    )  # fmt: skip


def conv2(classes: int = 10, channels: int = 1, size: int = 28) -> nn.Module:
    """Conv-2 (Frankle & Carbin 2019, arXiv 1803.03635, figure 2): two convolutions, three linear layers.

    3,317,450 parameters for MNIST, 4,301,642 for CIFAR-10. ``channels`` and ``size`` are those of the images.

    >>> sum(p.numel() for p in conv2().parameters())
    3317450
    """
    return _convs((64,), classes, channels, size)


def conv4(classes: int = 10, channels: int = 1, size: int = 28) -> nn.Module:
    """Conv-4: as :func:`conv2` with two convolutions of 128 channels more; 1,933,258 parameters for MNIST.

    >>> sum(p.numel() for p in conv4().parameters())
    1933258
    """
    return _convs((64, 128), classes, channels, size)


def conv6(classes: int = 10, channels: int = 1, size: int = 28) -> nn.Module:
    """Conv-6: as :func:`conv4` with two convolutions of 256 channels more; 1,802,698 parameters for MNIST.

    >>> sum(p.numel() for p in conv6().parameters())
    1802698
    """
    return _convs((64, 128, 256), classes, channels, size)


def _convs(widths: Sequence[int], classes: int, channels: int, size: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in widths:
        for inputs in (channels, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels, size = width, size // 2
    if not size:
        raise ValueError(
            f"size: images vanish after {len(widths)} poolings; expected at least {2 ** len(widths)}"
        )
    layers += [
        nn.Flatten(),
        nn.Linear(channels * size * size, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
    ]
    return _initialised(nn.Sequential(*layers, nn.Linear(256, classes)))


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(branch + self.shortcut(x))


class _ResNet(nn.Module):
    """A 3 x 3 stem, stages of ``blocks`` blocks that halve the image from the second on, a global average."""

    def __init__(self, widths: Sequence[int], *, blocks: int, classes: int, has_bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for place, width in enumerate(widths):
            strides = [1 if place == 0 else 2] + [1] * (blocks - 1)
            ends = [inputs] + [width] * (blocks - 1)
            stages += [_ResidualBlock(end, width, stride) for end, stride in zip(ends, strides, strict=True)]
            inputs = width
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.fc(self.pool(features).flatten(1))  # type: ignore[no-any-return]


class _VGG(nn.Module):
    """Convolutions with batch norm, max-pools where ``widths`` has a zero; the last pool is an average."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in widths[:-1]:
            if width:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))  # type: ignore[no-any-return]


def _initialised(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
