"""Plain factors: two thin layers in the place of one, without orthonormal bases."""

from __future__ import annotations

from torch import Tensor, nn


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
