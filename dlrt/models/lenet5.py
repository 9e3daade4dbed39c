"""LeNet5 as in the paper's experiments: two convolutions and two linear layers, 430,500 weights on MNIST."""

from torch import Tensor, nn


class LeNet5(nn.Module):
    """5 x 5 convolutions with 20 and 50 channels and max pooling, then 500 units, then the classes.

    shape is (channels, height, width) of the input, at least 16 pixels a side.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 16:
            raise ValueError(f"LeNet5 needs pictures of at least 16 x 16 pixels, got {height} x {width}")
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.fc1 = nn.Linear(50 * rows * columns, 500)
        self.fc2 = nn.Linear(500, classes)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.pool(self.conv1(x)))
        x = self.relu(self.pool(self.conv2(x)))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))
