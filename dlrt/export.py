"""Low-rank networks as plain torch modules, for programs that know nothing of dlrt."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dlrt.convert import replace_layers
from dlrt.convolutions import LowRankConv2d, SpatialLowRankConv2d
from dlrt.layers import LowRankLayer


def export(model: nn.Module) -> nn.Module:
    """A copy of a model with torch's own layers in place of the low-rank ones.

    A layer y = x V Sᵀ Uᵀ + bias becomes nn.Sequential of two thin ones, with the weights S Vᵀ and U, where
    r (m + n) < m n, and one dense layer where not. Modes, types, devices and frozen weights are kept, and a
    module that occurs twice stays one. The copy shares no memory with the model; hooks that sat on a low-rank
    layer are left behind. Nothing of dlrt is left in it, but for `dlrt.Attention` around thin layers, which
    torch has no module for.
    """
    return replace_layers(deepcopy(model), plain_layer)


def plain_layer(layer: LowRankLayer) -> nn.Module:
    """Two thin layers with the weights S Vᵀ and U, or a dense one where they would cost as much."""
    (m, n), r = layer.shape, layer.rank
    if r * (m + n) >= m * n:
        return layer.to_dense()
    with torch.device("meta"):
        first, second = _pair(layer, biased=layer.bias is not None)
    U = layer.U.unflatten(0, (layer.outputs, -1)).transpose(1, 2)  # (outputs, r, rows of W for each)
    for thin, weight in ((first, layer.S @ layer.V.mT), (second, U)):
        weight = weight.detach().reshape(thin.weight.shape).contiguous()
        thin.weight = nn.Parameter(weight, requires_grad=layer.S.requires_grad)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)


def _pair(layer: LowRankLayer, biased: bool) -> tuple[nn.Module, nn.Module]:
    """Two layers without weights yet; the first convolution has the geometry, or what is horizontal of it."""
    if isinstance(layer, LowRankConv2d):
        spatial = isinstance(layer, SpatialLowRankConv2d)
        first = _geometry(layer, vertical=not spatial, horizontal=True)
        second = _geometry(layer, vertical=spatial, horizontal=False)
        return (
            nn.Conv2d(layer.in_channels, layer.rank, bias=False, **first),
            nn.Conv2d(layer.rank, layer.out_channels, bias=biased, **second),
        )
    return (
        nn.Linear(layer.in_features, layer.rank, bias=False),
        nn.Linear(layer.rank, layer.out_features, bias=biased),
    )


def _geometry(layer: LowRankConv2d, vertical: bool, horizontal: bool) -> dict[str, Any]:
    """The arguments of nn.Conv2d for a convolution that does what a layer does along these directions."""
    geometry = {"padding_mode": layer.padding_mode if vertical or horizontal else "zeros"}
    for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        sizes = getattr(layer, name)
        if not isinstance(sizes, str):  # padding may be "same" or "valid"
            down, across = sizes
            sizes = (down if vertical else neutral, across if horizontal else neutral)
        geometry[name] = sizes
    return geometry
