"""Low-rank networks as plain torch modules, for programs that know nothing of dlrt."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from dlrt.convert import replace_layers
from dlrt.layers import LowRankConv2d, LowRankLayer

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def export(model: nn.Module) -> nn.Module:
    """A copy of a model with torch's own layers in place of the low-rank ones: nothing of dlrt is left in it.

    A layer y = x V Sᵀ Uᵀ + bias becomes nn.Sequential of two thin ones, with the weights S Vᵀ and U, where
    r (m + n) < m n, and one dense layer where not. Modes, types, devices and frozen weights are kept, and a
    module that occurs twice stays one. The copy shares no memory with the model; hooks that sat on a low-rank
    layer are left behind.
    """
    return replace_layers(deepcopy(model), _plain)


def _plain(layer: LowRankLayer) -> nn.Module:
    (m, n), r = layer.shape, layer.rank
    if r * (m + n) >= m * n:
        return layer.to_dense()
    with torch.device("meta"):
        first, second = _pair(layer, biased=layer.bias is not None)
    for thin, weight in ((first, layer.S @ layer.V.mT), (second, layer.U)):
        weight = weight.detach().reshape(thin.weight.shape).contiguous()
        thin.weight = nn.Parameter(weight, requires_grad=layer.S.requires_grad)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)


def _pair(layer: LowRankLayer, biased: bool) -> tuple[nn.Module, nn.Module]:
    """Two layers without weights yet; of two convolutions the first has the geometry, the second is 1 x 1."""
    if isinstance(layer, LowRankConv2d):
        geometry = {name: getattr(layer, name) for name in GEOMETRY}
        return (
            nn.Conv2d(layer.in_channels, layer.rank, bias=False, **geometry),
            nn.Conv2d(layer.rank, layer.out_channels, kernel_size=1, bias=biased),
        )
    return (
        nn.Linear(layer.in_features, layer.rank, bias=False),
        nn.Linear(layer.rank, layer.out_features, bias=biased),
    )
