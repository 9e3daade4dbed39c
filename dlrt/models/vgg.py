"""VGG16 with batch normalisation for small pictures. Simonyan & Zisserman 2015, configuration D."""

from torch import Tensor, nn

CHANNELS = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]  # pooling after each row


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages, and one linear layer on what is left of 32 x 32 pixels.

    shape is (channels, height, width) of the input, at least 32 pixels a side; width is the share of their
    channels that the convolutions have.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        before, rows, columns = shape
        if min(rows, columns) < 32:
            raise ValueError(f"VGG16 needs pictures of at least 32 x 32 pixels, got {rows} x {columns}")
        layers: list[nn.Module] = []
        for stage in CHANNELS:
            for channels in (max(1, round(width * count)) for count in stage):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
                layers += [nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (rows // 32) * (columns // 32), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
