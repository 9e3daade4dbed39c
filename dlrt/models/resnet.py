"""ResNets for CIFAR with parameter-free shortcuts. He et al. 2016, option A."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which takes every second pixel and adds channels of zeros."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.added = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.added:
            before = self.added // 2
            shortcut = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before)
            )
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """Three stages of so many blocks each, with 16, 32 and 64 channels, or that share of them, width.

    shape is (channels, height, width) of the input.
    """

    def __init__(self, blocks: int, shape: tuple[int, int, int], classes: int, width: float) -> None:
        super().__init__()
        channels = max(1, round(16 * width))
        self.conv1 = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(blocks, channels, channels, stride=1)
        self.layer2 = self._stage(blocks, channels, 2 * channels, stride=2)
        self.layer3 = self._stage(blocks, 2 * channels, 4 * channels, stride=2)
        self.linear = nn.Linear(4 * channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, blocks: int, before: int, channels: int, stride: int) -> nn.Sequential:
        rest = (Block(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(Block(before, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet8(ResNet):
    """A block a stage: 75,290 parameters."""

    def __init__(
        self, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__(1, shape, classes, width)


class ResNet20(ResNet):
    """Three blocks a stage: 269,722 parameters."""

    def __init__(
        self, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__(3, shape, classes, width)
