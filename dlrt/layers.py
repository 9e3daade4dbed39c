"""Layers whose weight lives as W = U S Vᵀ: what they share, and the linear one.

A layer maps x to y = x V Sᵀ Uᵀ + bias: two thin maps with a small one in between.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.compiled import compiled_map
from dlrt.gradient import Gradient, RecordedMap
from dlrt.lowrank import LowRank, check_rank


class LowRankLayer(nn.Module):
    """What the low-rank layers share: the factors of W (m, n), the bias, the forward pass.

    U (m, r) and V (n, r) are parameters without gradient, which `dlrt.DLRT` moves; S (r, r) and bias
    (outputs,) are trained by any optimizer. DLRT sets `gradient`, and then every forward pass in training
    mode records; otherwise the layer is an ordinary differentiable module. The subclasses supply
    `gradient.Maps`.
    """

    outputs: int
    """Features or channels that come out; W has as many rows, or several of them for each."""

    def __init__(
        self, rows: int, columns: int, rank: int, outputs: int, bias: bool, device=None, dtype=None
    ) -> None:
        check_rank(rank, rows, columns)
        super().__init__()
        options = {"device": device, "dtype": dtype}
        # every basis has contiguous columns, see `lowrank.complement`
        self.U = nn.Parameter(torch.empty(rank, rows, **options).mT, requires_grad=False)
        self.S = nn.Parameter(torch.empty(rank, rank, **options))
        self.V = nn.Parameter(torch.empty(rank, columns, **options).mT, requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs, **options)) if bias else None)
        self.outputs = outputs
        self.gradient: Gradient | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal bases and equal singular values; the norms are those of torch's dense layers."""
        (rows, columns), rank = self.shape, self.rank
        fan_in = rows * columns / self.outputs
        nn.init.orthogonal_(self.U)
        nn.init.orthogonal_(self.V)
        # torch draws entries of variance 1 / (3 fan_in)
        self.S.copy_(torch.eye(rank) * math.sqrt(self.outputs / (3 * rank)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    @classmethod
    def from_dense(cls, dense: nn.Module, rank: int | None = None, tau: float | None = None) -> LowRankLayer:
        """The truncated SVD of a dense layer's weight; the bias is shared with it, not copied."""
        layer = cls.in_place_of(dense)
        layer.factors = LowRank.from_dense(cls.as_matrix(dense.weight.detach()), rank, tau)
        return layer

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A dense layer's weight as the matrix W (m, n)."""
        return weight.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight as a matrix."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def rank(self) -> int:
        return min(self.S.shape)

    @property
    def factors(self) -> LowRank:
        return LowRank(self.U, self.S, self.V)

    @factors.setter
    def factors(self, Y: LowRank) -> None:
        U, V = (basis.mT.contiguous().mT for basis in (Y.U, Y.V))  # no copy of what an integrator made
        for parameter, data in ((self.U, U), (self.S, Y.S), (self.V, V)):
            replace_data(parameter, data)

    def forward(self, x: Tensor) -> Tensor:
        records = self.gradient is not None and not self.gradient.paused
        records = records and self.training and torch.is_grad_enabled()
        if not records or torch.compiler.is_exporting():
            U, V = self.U.detach(), self.V.detach()  # model.requires_grad_() reaches them, gradients must not
            return self.lift(self.project(x, V), U, self.S, self.bias)
        if torch.compiler.is_compiling():
            return compiled_map(x, self.S, self.bias, self.gradient.number)
        self.gradient.expect()
        return RecordedMap.apply(x, self.S, self.bias, self)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A checkpoint of any rank loads: the factors take its rank first."""
        U, S, V = (state_dict.get(prefix + name) for name in "USV")
        known = U is not None and S is not None and V is not None
        if known and (len(U), len(V)) == self.shape and S.shape != self.S.shape:
            self.factors = LowRank(
                *(torch.empty_like(T, device=self.S.device, dtype=self.S.dtype) for T in (U, S, V))
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        """A copy records nothing until an optimizer of its own asks it to."""
        return {**self.__dict__, "gradient": None}


class LowRankLinear(LowRankLayer):
    """nn.Linear with the weight U S Vᵀ (out_features, in_features) of the given rank.

    Input (..., in_features), output (..., out_features). ValueError where the rank is impossible.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None
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
        return self.factors.dense()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return super().forward(x)
        return super().forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def project(self, x: Tensor, V: Tensor) -> Tensor:
        return x @ V

    def lift(self, a: Tensor, U: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(a @ S.mT, U, bias)

    def lift_adjoint(self, g: Tensor, U: Tensor, x: Tensor) -> Tensor:
        return g @ U

    def project_adjoint(self, b: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
        return (b @ S) @ V.mT

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        return (a.mT @ g).mT  # gᵀ a, in the layout of a basis and on a CPU several times faster

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        return (b.mT @ x).mT

    def whole_product(self, g: Tensor, x: Tensor) -> Tensor:
        return g.mT @ x

    def core_product(self, b: Tensor, a: Tensor) -> Tensor:
        return b.mT @ a

    def total(self, g: Tensor) -> Tensor:
        return g.sum(0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def take_over(layer: LowRankLayer, dense: nn.Module) -> LowRankLayer:
    """Give a new layer what a dense layer has beside its weight: bias, mode, type, device."""
    layer.to(dense.weight)
    layer.bias = dense.bias
    layer.S.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def give_back(layer: LowRankLayer, dense: nn.Module) -> nn.Module:
    """The reverse of `take_over`."""
    dense.weight = nn.Parameter(layer.weight.detach(), requires_grad=layer.S.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; it stays the same object for whoever holds it."""
    data, parameter.grad = data.detach(), None
    # torch expects a gradient of the old shape while an old loss is alive, unless the type changed in between
    parameter.data = data.new_empty(0, dtype=torch.half if data.dtype != torch.half else torch.float)
    parameter.data = data
