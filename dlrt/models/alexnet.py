"""AlexNet for small pictures: five convolutions, three linear layers. Krizhevsky et al. 2012, for 32 x 32."""

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Kernels of 3 x 3 and pooling of 2 x 2 in place of the original's larger ones, and no overlap.

    shape is (channels, height, width) of the input, at least 16 pixels a side; width is the share of their
    channels and features that hidden layers have.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: float = 1.0
    ) -> None:
        super().__init__()
        if min(shape[1:]) < 16:
            raise ValueError(
                f"AlexNet needs pictures of at least 16 x 16 pixels, got {shape[1]} x {shape[2]}"
            )
        a, b, c, d, e = (max(1, round(width * channels)) for channels in (64, 192, 384, 256, 4096))
        self.conv1 = nn.Conv2d(shape[0], a, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1)
        self.conv3 = nn.Conv2d(b, c, 3, padding=1)
        self.conv4 = nn.Conv2d(c, d, 3, padding=1)
        self.conv5 = nn.Conv2d(d, d, 3, padding=1)
        rows, columns = ((side + 1) // 2 // 8 for side in shape[1:])
        self.fc1 = nn.Linear(d * rows * columns, e)
        self.fc2 = nn.Linear(e, e)
        self.fc3 = nn.Linear(e, classes)
        self.pool, self.relu, self.dropout = nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # there are no norms: with torch's own weights every picture looks alike at the end
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv4(self.relu(self.conv3(x))))
        x = self.pool(self.relu(self.conv5(x)))
        x = self.dropout(self.relu(self.fc1(self.dropout(x.flatten(1)))))
        return self.fc3(self.relu(self.fc2(x)))
