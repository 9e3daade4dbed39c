"""Plain factors: two thin layers in the place of one, without orthonormal bases."""

from __future__ import annotations

from torch import Tensor, nn

from dlrt.layers import LowRankLayer
from dlrt.ranks import pays


class Factors(nn.Sequential):
    """Two thin layers whose matrices B (r, n) and then A (m, r) stand for W = A B."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """B and A: views where the layout allows it, else copies."""
        B, A = (layer.weight for layer in self)
        return B.flatten(1), A.movedim(1, -1).flatten(0, -2)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of W."""
        B, A = self.matrices()
        return len(A), B.shape[1]

    @property
    def rank(self) -> int:
        return len(self.matrices()[0])


def plain_layer(layer: LowRankLayer) -> nn.Module:
    """Two thin layers with the weights S Vᵀ and U, or a dense one where they would cost as much."""
    return as_thin_layers(layer) if pays(layer.rank, layer.shape) else layer.to_dense()


def as_thin_layers(layer: LowRankLayer) -> nn.Sequential:
    """Two thin layers of torch with the weights S Vᵀ and U, whatever they cost."""
    first, second = layer.thin_layers()
    U = layer.U.unflatten(0, (layer.outputs, -1)).transpose(1, 2)  # (outputs, r, rows of W for each)
    for thin, weight in ((first, layer.S @ layer.V.mT), (second, U)):
        weight = weight.detach().reshape(thin.weight.shape).contiguous()
        thin.weight = nn.Parameter(weight, requires_grad=layer.S.requires_grad)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)
