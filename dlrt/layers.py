"""Layers whose weight lives as W = U S Vᵀ: what they share, and the linear one.

A layer maps x to y = x V Sᵀ Uᵀ + bias: two thin maps with a small one in between. With G = ∇_W L, K = U S and
L = V Sᵀ, the backward pass gives U the K-gradient G V, V the L-gradient Gᵀ U and S the S-gradient Uᵀ G V, as
their ordinary `.grad`: all that a step along the manifold needs (Schotthöfer et al. 2022, section 4).
"""

from __future__ import annotations

import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlrt.checks import check_orthonormal, check_rank, check_real
from dlrt.lowrank import LowRank, at_least_single


class DenseWeight(torch.autograd.Function):
    """W = U S Vᵀ (m, n), for whatever wants the dense weight; G comes back as K-, L- and S-gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return U @ S @ V.mT

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, G: Tensor) -> tuple[Tensor, ...]:
        U, V = ctx.saved_tensors
        G = G.to(U.dtype)
        GV = G @ V
        return GV, U.mT @ GV, G.mT @ U


class LinearMap(torch.autograd.Function):
    """y = x V Sᵀ Uᵀ + bias for rows x (b, n), and a = x V, which the backward pass needs again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        a = x @ V
        return F.linear(a @ S.mT, U, bias), a

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of a, which would be zeros
        ctx.save_for_backward(*inputs[:4], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        of_x, of_U, of_S, of_V, of_bias = ctx.needs_input_grad
        x, U, S, V, a = in_type_of(g, ctx.saved_tensors)
        b = g @ U
        return (
            (b @ S) @ V.mT if of_x else None,
            g.mT @ a if of_U else None,  # gᵀ x V = G V
            b.mT @ a if of_S else None,
            x.mT @ b if of_V else None,
            g.sum(0) if of_bias else None,
        )


FACTORS = ("U", "S", "V")


class LowRankParameters(dict):
    """The parameters of a low-rank layer. What would normalise or prune a weight is told that it cannot."""

    def __contains__(self, name: object) -> bool:
        if name == "weight":
            self._refuse()
        return super().__contains__(name)

    def __missing__(self, name: str) -> None:
        if name not in self:  # which refuses the weight
            raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name in self and name in FACTORS:
            self._refuse()
        super().__delitem__(name)

    @staticmethod
    def _refuse() -> None:
        raise TypeError(
            "the weight of a low-rank layer is no parameter, and U, S and V must not be normalised, pruned "
            "or replaced: leave this layer dense, with skip of dlrt.to_low_rank"
        )


class LowRankLayer(nn.Module):
    """What the low-rank layers share: the factors of W (m, n), the bias, the forward pass.

    S (r, r) and bias (outputs,) are trained by any optimizer. U (m, r) and V (n, r) have no gradient until a
    `dlrt.DLRT` owns the layer and sets `trains_bases`. A copy, or a layer read from a file, is nobody's. The
    subclasses supply `dense_map`, `plain_map` and `map`; `thin_layers`, two of torch's layers without weights
    for S Vᵀ and U; `input_rows`, a row of x for each product with W of a dense layer, and `output_rows`, the
    gradient for each of these products, from the gradient g for the output.
    """

    outputs: int
    """Features or channels that come out; W has as many rows, or several of them for each."""

    def __init__(
        self, rows: int, columns: int, rank: int, outputs: int, bias: bool, device=None, dtype=None
    ) -> None:
        check_rank(rank, rows, columns)
        super().__init__()
        self._parameters = LowRankParameters()
        options = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(rows, rank, **options), requires_grad=False)
        self.S = nn.Parameter(torch.empty(rank, rank, **options))
        self.V = nn.Parameter(torch.empty(columns, rank, **options), requires_grad=False)
        check_real(self.S)
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs, **options)) if bias else None)
        self.outputs = outputs
        self._trains_bases = False
        self.owner: weakref.ref | None = None  # to the DLRT that was made of this layer last
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal bases and equal singular values; the norms are those of torch's dense layers."""
        (rows, columns), rank = self.shape, self.rank
        fan_in = rows * columns / self.outputs
        for basis in (self.U, self.V):
            basis.copy_(nn.init.orthogonal_(at_least_single(basis)))
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
        self._tell_owner()
        self.write(Y)

    def write(self, Y: LowRank) -> None:
        """The setter for the owner itself, whose velocity goes along."""
        for parameter, data in ((self.U, Y.U), (self.S, Y.S), (self.V, Y.V)):
            replace_data(parameter, data)

    def _tell_owner(self) -> None:
        """Before others write into the bases, in which the owner has a velocity; only the layer sees it."""
        owner = None if self.owner is None else self.owner()
        if owner is not None:
            owner.remember_bases(self)

    @property
    def trains_bases(self) -> bool:
        """Whether U and V take part in autograd; only a `dlrt.DLRT` can use what they get."""
        return self._trains_bases

    @trains_bases.setter
    def trains_bases(self, value: bool) -> None:
        self._trains_bases = value
        for basis in (self.U, self.V):
            basis.requires_grad_(value)
            basis.grad = None

    def forward(self, x: Tensor) -> Tensor:
        U, S, V = self.U, self.S, self.V
        m, n, r = U.shape[0], V.shape[0], min(S.shape)
        if r * (m + n) >= m * n:  # then one dense map costs less than two thin ones
            return self.dense_map(x, self.weight)
        if not self._trains_bases or not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self.plain_map(x, U.detach(), S, V.detach())
        device = x.device.type
        if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # so that it waits for the backward pass as such
        return self.map(x, U, S, V)

    def _matrix(self) -> Tensor:
        """U S Vᵀ (m, n), through which the factors get their gradients."""
        if self._trains_bases and torch.is_grad_enabled():
            return DenseWeight.apply(self.U, self.S, self.V)
        return self.U.detach() @ self.S @ self.V.detach().mT

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A checkpoint of any rank loads: the factors take its rank first. Its bases must be orthonormal.

        That of a dense layer is one of full rank.
        """
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            Y = LowRank.from_dense(self.as_matrix(weight))
            state_dict.update({f"{prefix}{name}": getattr(Y, name) for name in FACTORS})
        U, S, V = (state_dict.get(prefix + name) for name in "USV")
        known = U is not None and S is not None and V is not None
        if known and (len(U), len(V)) == self.shape:
            self._tell_owner()
            if S.shape != self.S.shape:
                self.write(
                    LowRank(
                        *(torch.empty_like(T, device=self.S.device, dtype=self.S.dtype) for T in (U, S, V))
                    )
                )
            try:
                check_orthonormal(prefix[:-1] or type(self).__name__, U, V)
            except ValueError as error:
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith(("weight", *(f"{factor}_" for factor in FACTORS))):  # as pruning does
            self._parameters._refuse()
        super().register_parameter(name, param)

    def __getstate__(self) -> dict:
        """A copy belongs to no optimizer."""
        return {**self.__dict__, "_trains_bases": False, "owner": None}


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


def rows_of(x: Tensor, channels: int) -> Tensor:
    """x as a matrix with a column for each channel; `channels` is their dimension in x."""
    x = x.movedim(channels, -1)
    return x.reshape(-1, x.shape[-1])


def in_type_of(g: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For backward passes: under autocast g may be bfloat16 or float16, and the factors never are."""
    return tuple(tensor.to(g.dtype) for tensor in tensors)


def take_over(layer: LowRankLayer, dense: nn.Module) -> LowRankLayer:
    """Give a new layer what a dense layer has beside its weight: bias, mode, type, device."""
    layer.to(dense.weight)
    layer.bias = dense.bias
    layer.S.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def give_back(layer: LowRankLayer, dense: nn.Module) -> nn.Module:
    """The reverse of `take_over`."""
    dense.weight = nn.Parameter(layer.weight.detach().contiguous(), requires_grad=layer.S.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)


def become(module: nn.Module, other: nn.Module) -> None:
    """Give a module class and contents of another one; it stays the same object for whoever holds it."""
    module.__class__, module.__dict__ = type(other), other.__dict__


@torch.no_grad()
def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of any shape; it stays the same object for whoever holds it.

    Written in place, so that autograd notices where a backward pass still needs the old values.
    """
    if parameter.shape != data.shape:
        parameter.grad = None
        # torch expects a gradient of the old shape while an old loss is alive, unless the type changed
        other = torch.half if data.dtype != torch.half else torch.float
        parameter.data = data.new_empty(0, dtype=other)
        parameter.data = torch.empty_like(data, memory_format=torch.contiguous_format)
    parameter.copy_(data)
