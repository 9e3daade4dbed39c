"""The networks of the experiments: plain torch modules, made for an input shape and a number of classes."""

from dlrt.models.lenet5 import LeNet5
from dlrt.models.mlp import MLP

__all__ = ["MLP", "LeNet5"]
