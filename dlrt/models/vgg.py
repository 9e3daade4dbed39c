"""VGG16 with batch normalisation for small pictures. Simonyan & Zisserman 2015, configuration D."""

from torch import Tensor, nn

CHANNELS = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]  # pooling after each row


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages, and one linear layer on what is left of 32 x 32 pixels.

    shape is (channels, height, width) of the input, at least 32 pixels a side.
    """

    def __init__(self, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        before, height, width = shape
        if min(height, width) < 32:
            raise ValueError(f"VGG16 needs pictures of at least 32 x 32 pixels, got {height} x {width}")
        layers: list[nn.Module] = []
        for stage in CHANNELS:
            for channels in stage:
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
                layers += [nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (height // 32) * (width // 32), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
