"""What all layers share whose weight lives as W = U S Vᵀ: factors, forward pass, reading of checkpoints."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from dlrt.checks import check_orthonormal, check_rank, check_real
from dlrt.lowrank import LowRank, at_least_single
from dlrt.products import DenseWeight
from dlrt.ranks import pays
from dlrt.replacing import replace_data

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

    S (r, r) and bias (outputs,) are trained by any optimizer. U (m, r) and V (n, r) have a gradient only
    while a `dlrt.DLRT` owns the layer and sets `trains_bases`. A copy, or a layer read from a file, is
    nobody's. The subclasses supply `in_place_of` and `to_dense`; `weight`, in the form of the dense layer's;
    `dense_map`, `plain_map` and `map`; `thin_layers`, two of torch's layers without weights for S Vᵀ and U;
    `input_rows`, a row of x for each product with W of a dense layer, and `output_rows`, the gradient for
    each of these products, from the gradient g for the output.
    """

    outputs: int
    """Features or channels that come out; W has as many rows, or several of them for each."""

    def __init__(
        self,
        rows: int,
        columns: int,
        rank: int,
        outputs: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        self._tell_owner((rank, rank))
        if self.S.shape != (rank, rank):  # bases rest
            self.write(LowRank(self.U[:, :rank], self.S[:rank, :rank], self.V[:, :rank]))
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
        self._tell_owner(Y.S.shape)
        self.write(Y)

    def write(self, Y: LowRank) -> None:
        """The setter for the owner itself, whose velocity goes along."""
        for parameter, data in ((self.U, Y.U), (self.S, Y.S), (self.V, Y.V)):
            replace_data(parameter, data)

    def belong_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a DLRT own the layer. When it is gone, bases rest: others would leave them not orthonormal."""
        this = weakref.ref(self)

        def rest(_: weakref.ref) -> None:
            if (layer := this()) is not None:
                layer.trains_bases = False

        self.owner = weakref.ref(optimizer, rest)

    def _tell_owner(self, shape: tuple[int, int]) -> None:
        """Before others write factors, with S of that shape; the owner's velocity is in the present bases."""
        owner = None if self.owner is None else self.owner()
        if owner is not None:
            owner.remember_bases(self, shape)

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
        if not pays(self.rank, self.shape):  # then one dense map costs less than two thin ones
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
        own_name, weight = prefix[:-1] or type(self).__name__, state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            try:
                Y = LowRank.from_dense(self.as_matrix(weight))
                state_dict.update({f"{prefix}{name}": getattr(Y, name) for name in FACTORS})
            except (IndexError, RuntimeError) as error:  # no matrix, or its SVD fails
                came = f"{tuple(weight.shape)}, {error}"
                errors.append(f"the weight of {own_name} must be a finite matrix or kernel, got {came}")
        U, S, V = (state_dict.get(prefix + name) for name in FACTORS)
        known = U is not None and S is not None and V is not None
        if known and (len(U), len(V)) == self.shape:
            self._tell_owner(S.shape)
            if S.shape != self.S.shape:
                self.write(
                    LowRank(
                        *(torch.empty_like(T, device=self.S.device, dtype=self.S.dtype) for T in (U, S, V))
                    )
                )
            try:
                check_orthonormal(own_name, U, V)
            except ValueError as error:
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith(("weight", *(f"{factor}_" for factor in FACTORS))):  # as pruning does
            self._parameters._refuse()
        super().register_parameter(name, param)

    def __getstate__(self) -> dict:
        """A copy belongs to no optimizer: its bases rest."""
        parameters = LowRankParameters(self._parameters)
        for name in "UV" if self._trains_bases else "":
            parameters[name] = nn.Parameter(parameters[name].detach(), requires_grad=False)
        return {**self.__dict__, "_parameters": parameters, "_trains_bases": False, "owner": None}


def rows_of(x: Tensor, channels: int) -> Tensor:
    """x as a matrix with a column for each channel; `channels` is their dimension in x."""
    x = x.movedim(channels, -1)
    return x.reshape(-1, x.shape[-1])
