"""The networks of the experiments: plain torch modules, made for an input shape and a number of classes."""

from dlrt.models.alexnet import AlexNet
from dlrt.models.convnet import ConvNet
from dlrt.models.efficientnet import EfficientNetLite0
from dlrt.models.gpt import GPT
from dlrt.models.lenet5 import LeNet5
from dlrt.models.mlp import MLP
from dlrt.models.resnet import ResNet8, ResNet20
from dlrt.models.vgg import VGG16

__all__ = ["GPT", "MLP", "VGG16", "AlexNet", "ConvNet", "EfficientNetLite0", "LeNet5", "ResNet8", "ResNet20"]
