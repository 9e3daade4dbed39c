"""The five-layer fully connected network of the paper's experiments, 784-w-w-w-w-10 on MNIST."""

import math

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers fc1 ... fc5 with ReLU in between; shape is (channels, height, width) of the input."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, width: int = 500
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(math.prod(shape), width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, width)
        self.fc5 = nn.Linear(width, classes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4):
            x = self.relu(layer(x))
        return self.fc5(x)
