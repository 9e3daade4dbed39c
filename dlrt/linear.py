"""The linear layer whose weight lives as W = U S Vᵀ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.layers import LowRankLayer, rows_of
from dlrt.products import LinearMap
from dlrt.replacing import give_back, take_over


class LowRankLinear(LowRankLayer):
    """nn.Linear with the weight U S Vᵀ (out_features, in_features) of the given rank.

    Input (..., in_features), output (..., out_features). ValueError where the rank is impossible.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, rank, out_features, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def in_place_of(cls, linear: nn.Linear) -> LowRankLinear:
        """A layer of rank 1, whose factors are still to be set, that shares all else with a dense one."""
        layer = cls(linear.in_features, linear.out_features, 1, linear.bias is not None)
        return take_over(layer, linear)

    def to_dense(self) -> nn.Linear:
        """nn.Linear with the same map."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return give_back(self, dense)

    @property
    def weight(self) -> Tensor:
        """The dense weight U S Vᵀ, (out_features, in_features); a new tensor at every call."""
        return self._matrix()

    def dense_map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def plain_map(self, x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return F.linear(x @ V @ S.mT, U, self.bias)

    def map(self, x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input must have {self.in_features} features, got {tuple(x.shape)}: flatten it before?"
            )
        y, _ = LinearMap.apply(x.reshape(-1, self.in_features), U, S, V, self.bias)
        return y.view(*x.shape[:-1], self.out_features) if x.dim() != 2 else y

    def thin_layers(self) -> tuple[nn.Linear, nn.Linear]:
        first = nn.Linear(self.in_features, self.rank, bias=False, device="meta")
        return first, nn.Linear(self.rank, self.out_features, self.bias is not None, device="meta")

    @staticmethod
    def input_rows(dense: nn.Linear, x: Tensor) -> Tensor:
        return rows_of(x, -1)

    @staticmethod
    def output_rows(dense: nn.Linear, g: Tensor) -> Tensor:
        return rows_of(g, -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"
