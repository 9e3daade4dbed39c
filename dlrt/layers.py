"""Linear and convolutional layers whose weight lives as W = U S Vᵀ.

A layer maps x to y = x V Sᵀ Uᵀ + bias: two thin maps with a small one in between. In a convolution the rows
of x are the patches under the kernel, which are never unfolded: x V is a convolution with r filters, the rest
is 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        return _take_over(layer, linear)

    def to_dense(self) -> nn.Linear:
        """nn.Linear with the same map."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _give_back(self, dense)

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

    def total(self, g: Tensor) -> Tensor:
        return g.sum(0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


CHANNELS_LAST = torch.channels_last
# a CPU makes as many channels of a convolution at a time: it gains nothing by fewer, and a second map costs
FEWEST_FILTERS = 16
SAME_IN_DENSE = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "padding_mode",
)


class LowRankConv2d(LowRankLayer):
    """nn.Conv2d with the kernel U S Vᵀ, as a matrix (out_channels, in_channels * height * width).

    A convolution with `rank` filters followed by a 1 x 1 convolution; the arguments are those of nn.Conv2d,
    without groups. Input (batch, in_channels, h, w) or (in_channels, h, w). ValueError where the rank is
    impossible.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, device="meta", **options)  # checks them all
        super().__init__(*self.as_matrix(dense.weight).shape, rank, out_channels, bias, device, dtype)
        for name in SAME_IN_DENSE:
            setattr(self, name, getattr(dense, name))
        pads_itself = padding_mode == "zeros" and not isinstance(padding, str)
        self._pad_before = None if pads_itself else list(dense._reversed_padding_repeated_twice)
        inner_padding = self.padding if pads_itself else (0, 0)
        self._geometry = {"stride": self.stride, "padding": inner_padding, "dilation": self.dilation}

    @classmethod
    def in_place_of(cls, conv: nn.Conv2d) -> LowRankConv2d:
        """A layer of rank 1, whose factors are still to be set, that shares all else with a dense one."""
        if conv.groups != 1:
            raise ValueError(
                f"a low-rank convolution needs groups = 1, got {conv.groups}: leave this layer dense"
            )
        same = {name: getattr(conv, name) for name in SAME_IN_DENSE}
        return _take_over(cls(**same, rank=1, bias=conv.bias is not None), conv)

    def to_dense(self) -> nn.Conv2d:
        """nn.Conv2d with the same map."""
        same = {name: getattr(self, name) for name in SAME_IN_DENSE}
        return _give_back(self, nn.Conv2d(**same, bias=self.bias is not None, device="meta"))

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (out_channels, in_channels, height, width); a new tensor at every call."""
        return self.factors.dense().unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self._pad_before is not None:
            x = F.pad(x, self._pad_before, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        x = _channels_last(x)
        if self.out_channels <= FEWEST_FILTERS and not self.training:
            return F.conv2d(
                x, self.weight.contiguous(memory_format=CHANNELS_LAST), self.bias, **self._geometry
            )
        return super().forward(x)

    # Pictures are channels-last throughout, so that all but the convolution itself is a product of two
    # matrices with a row for every position. With many of those S costs least inside the small matrices.

    def _filters(self, V: Tensor) -> Tensor:
        filters = V.mT.unflatten(1, (self.in_channels, *self.kernel_size))
        return filters.contiguous(memory_format=CHANNELS_LAST)

    def project(self, x: Tensor, V: Tensor) -> Tensor:
        a = F.conv2d(x, self._filters(V), **self._geometry)
        return a.contiguous(memory_format=CHANNELS_LAST)

    def lift(self, a: Tensor, U: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
        return _pictures(F.linear(_rows(a), U @ S, bias), like=a)

    def lift_adjoint(self, g: Tensor, U: Tensor, x: Tensor) -> Tensor:
        return _pictures(_rows(g) @ U, like=g)

    def project_adjoint(self, b: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
        return gradient_for_input(b, x.shape, self._filters(V @ S.mT), self._geometry)

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        return (_rows(a).mT @ _rows(g)).mT

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        filters = (b.shape[1], self.in_channels, *self.kernel_size)
        return gradient_for_filters(b, x, filters, self._geometry).flatten(1).mT

    def whole_product(self, g: Tensor, x: Tensor) -> Tensor:
        kernel = (self.out_channels, self.in_channels, *self.kernel_size)
        return self.as_matrix(gradient_for_filters(g, x, kernel, self._geometry))

    def total(self, g: Tensor) -> Tensor:
        rows = _rows(g)
        return rows.mT @ rows.new_ones(rows.shape[0])  # on a CPU ten times faster than a sum over rows

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        text += f", stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{text}, bias={self.bias is not None}"


Geometry = dict[str, tuple[int, int]]  # stride, padding, dilation


def gradient_for_input(g: Tensor, shape: Sequence[int], filters: Tensor, geometry: Geometry) -> Tensor:
    """What the gradient g for a convolution's output is for its input, of the given shape (N, C, H, W)."""
    x = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=CHANNELS_LAST)
    return _backward(g, x, filters, geometry, wanted=0)


def gradient_for_filters(g: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """What the gradient g for a convolution's output is for its filters, of the given shape (o, i, p, q)."""
    filters = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    return _backward(g, x, filters, geometry, wanted=1)


def _backward(g: Tensor, x: Tensor, filters: Tensor, geometry: Geometry, wanted: int) -> Tensor:
    where = (geometry[name] for name in ("stride", "padding", "dilation"))
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(g, x, filters, None, *where, False, [0, 0], 1, mask)[wanted]


def _channels_last(x: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in memory as (N, H, W, C), with strides that say so even where C = 1."""
    x = x.contiguous(memory_format=CHANNELS_LAST)
    height, width = x.shape[2:]
    return x if x.shape[1] > 1 else x.as_strided(x.shape, (height * width, 1, width, 1))


def _rows(x: Tensor) -> Tensor:
    """Channels-last pictures (N, C, H, W) as a matrix (N H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _pictures(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_rows`, for pictures as many and as large as others."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _take_over(layer: LowRankLayer, dense: nn.Module) -> LowRankLayer:
    """Give a new layer what a dense layer has beside its weight: bias, mode, type, device."""
    layer.to(dense.weight)
    layer.bias = dense.bias
    layer.S.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def _give_back(layer: LowRankLayer, dense: nn.Module) -> nn.Module:
    """The reverse of `_take_over`."""
    dense.weight = nn.Parameter(layer.weight.detach(), requires_grad=layer.S.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; it stays the same object for whoever holds it."""
    data, parameter.grad = data.detach(), None
    # torch expects a gradient of the old shape while an old loss is alive, unless the type changed in between
    parameter.data = data.new_empty(0, dtype=torch.half if data.dtype != torch.half else torch.float)
    parameter.data = data
