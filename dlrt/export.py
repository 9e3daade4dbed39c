"""Low-rank networks as plain torch modules, for programs that know nothing of dlrt."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from dlrt.convert import replace_layers
from dlrt.layers import LowRankLayer


def export(model: nn.Module) -> nn.Module:
    """A copy of a model with torch's own layers in place of the low-rank ones.

    A layer y = x V Sᵀ Uᵀ + bias becomes nn.Sequential of two thin ones, with the weights S Vᵀ and U, where
    r (m + n) < m n, and one dense layer where not. Modes, types, devices and frozen weights are kept, and a
    module that occurs twice stays one. The copy shares no memory with the model; hooks that sat on a low-rank
    layer are left behind. Nothing of dlrt is left in it, but for `dlrt.Attention` and `dlrt.Blocks` around
    thin layers: torch packs their weights.
    """
    return replace_layers(deepcopy(model), plain_layer)


def plain_layer(layer: LowRankLayer) -> nn.Module:
    """Two thin layers with the weights S Vᵀ and U, or a dense one where they would cost as much."""
    (m, n), r = layer.shape, layer.rank
    return layer.to_dense() if r * (m + n) >= m * n else as_thin_layers(layer)


def as_thin_layers(layer: LowRankLayer) -> nn.Sequential:
    """Two thin layers of torch with the weights S Vᵀ and U, whatever they cost."""
    first, second = layer.thin_layers()
    U = layer.U.unflatten(0, (layer.outputs, -1)).transpose(1, 2)  # (outputs, r, rows of W for each)
    for thin, weight in ((first, layer.S @ layer.V.mT), (second, U)):
        weight = weight.detach().reshape(thin.weight.shape).contiguous()
        thin.weight = nn.Parameter(weight, requires_grad=layer.S.requires_grad)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)
