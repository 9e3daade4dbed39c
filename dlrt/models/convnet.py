"""A small convolutional network with global average pooling, which trains in seconds: 60,688 weights."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Four 3 x 3 convolutions of 16, 32, 64 and 64 channels, two poolings, and one linear layer on the means.

    shape is (channels, height, width) of the input, at least 8 pixels a side; width the share of channels.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 32, 32), classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        if min(shape[1:]) < 8:
            raise ValueError(f"ConvNet needs pictures of at least 8 x 8 pixels, got {shape[1]} x {shape[2]}")
        layers: list[nn.Module] = []
        before = shape[0]
        for full, pooled in ((16, True), (32, True), (64, False), (64, False)):
            channels = max(1, round(full * width))
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(inplace=True)] + ([nn.MaxPool2d(2)] if pooled else [])
            before = channels
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))
