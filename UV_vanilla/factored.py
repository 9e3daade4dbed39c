"""LeNet5 from weights whose singular values decay, as plain factors U Vᵀ and as U S Vᵀ for DLRT."""

from __future__ import annotations

import torch
from torch import nn

from dlrt import LowRank, LowRankLayer, to_low_rank
from dlrt.baselines import balanced
from dlrt.convert import replace_layers
from dlrt.factors import Factors, as_thin_layers
from dlrt.flags import number
from dlrt.models import LeNet5

AS_IN_THE_PAPER = {
    "lr": 0.01, "momentum": 0.0, "schedule": "constant", "label_smoothing": 0.0, "augment": False
}  # fmt: skip
DECAY = number(float, "[1, inf)")
OF_DECAY = "of the singular values, from each to the next"


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
    """The weights of `decayed_lenet5`, each as two thin layers, S shared evenly between them."""
    model = decayed_lenet5(shape, classes, rank, decay)
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            layer.factors = balanced(layer.factors)
    return replace_layers(model, lambda layer: Factors(*as_thin_layers(layer)))
