"""Low-rank networks as plain torch modules, for programs that know nothing of dlrt."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from dlrt.convert import replace_layers
from dlrt.factors import plain_layer


def export(model: nn.Module) -> nn.Module:
    """A copy of a model with torch's own layers in place of the low-rank ones.

    A layer y = x V Sᵀ Uᵀ + bias becomes nn.Sequential of two thin ones, with the weights S Vᵀ and U, where
    r (m + n) < m n, and one dense layer where not. Modes, types, devices and frozen weights are kept, and a
    module that occurs twice stays one. The copy shares no memory with the model; hooks that sat on a low-rank
    layer are left behind. Nothing of dlrt is left in it, but for `dlrt.Attention` and `dlrt.Blocks` around
    thin layers: torch packs their weights.
    """
    return replace_layers(deepcopy(model), plain_layer)
