"""LeNet5 from weights whose singular values decay, as plain factors U Vᵀ and as U S Vᵀ for DLRT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt import LowRank, LowRankConv2d, LowRankLayer, to_low_rank
from dlrt.models import LeNet5
from dlrt.options import number

AS_IN_THE_PAPER = {
    "lr": 0.01, "momentum": 0.0, "schedule": "constant", "label_smoothing": 0.0, "augment": False
}  # fmt: skip
DECAY = number(float, "[1, inf)")
OF_DECAY = "of the singular values, from each to the next"


class VanillaLinear(nn.Module):
    """A linear layer of weight U Vᵀ, U (out, r), V (in, r), both trained by whatever optimizer comes."""

    def __init__(self, U: Tensor, V: Tensor, bias: nn.Parameter) -> None:
        super().__init__()
        self.U, self.V, self.bias = nn.Parameter(U), nn.Parameter(V), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.V, self.U, self.bias)


class VanillaConv2d(VanillaLinear):
    """The same for the kernel of a convolution, V (in * height * width, r)."""

    def __init__(self, U: Tensor, V: Tensor, bias: nn.Parameter, kernel: tuple[int, int, int]) -> None:
        super().__init__(U, V, bias)
        self.kernel = kernel  # (in, height, width)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.V.mT.unflatten(1, self.kernel).contiguous(memory_format=torch.channels_last)
        return F.conv2d(F.conv2d(x, filters), self.U[..., None, None], self.bias)


def decayed_lenet5(
    shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, rank: int = 20, decay: float = 1.0
) -> nn.Module:
    """LeNet5 of low-rank layers, all of that rank, or of full rank where that is less.

    The bases are those of the dense network's random weights, the singular values |N(0, 1)|, sorted, the
    k-th divided by decay^k, k = 0, 1, ...
    """
    model = to_low_rank(LeNet5(shape, classes), rank=rank)
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            sigma = torch.randn(layer.rank).abs().sort(descending=True).values
            sigma = sigma / decay ** torch.arange(layer.rank)
            layer.factors = LowRank(layer.U, sigma.diag(), layer.V)
    return model


def vanilla_lenet5(
    shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, rank: int = 20, decay: float = 1.0
) -> nn.Module:
    """The same weights as those of `decayed_lenet5`, S shared evenly between the two factors."""
    model = decayed_lenet5(shape, classes, rank, decay)
    for name, layer in list(model.named_children()):
        if isinstance(layer, LowRankLayer):
            root = layer.S.detach().sqrt()  # S is diagonal here
            U, V = layer.U @ root, layer.V @ root
            if isinstance(layer, LowRankConv2d):
                vanilla = VanillaConv2d(U, V, layer.bias, (layer.in_channels, *layer.kernel_size))
            else:
                vanilla = VanillaLinear(U, V, layer.bias)
            setattr(model, name, vanilla)
    return model
