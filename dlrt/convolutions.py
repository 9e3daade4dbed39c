"""Convolutions whose kernel lives as W = U S Vᵀ, as a matrix or across space.

The rows of x in y = x V Sᵀ Uᵀ + bias are patches of pictures, which are never unfolded: x V is a convolution
with r filters, and what follows is another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.layers import LowRankLayer, give_back, take_over

CHANNELS_LAST = torch.channels_last
# a CPU makes as many channels of a convolution at a time: it gains nothing by fewer, and a second map costs
FEWEST_FILTERS = 16
Geometry = dict[str, tuple[int, int]]  # stride, padding, dilation
NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1}
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
        return take_over(cls(**same, rank=1, bias=conv.bias is not None), conv)

    def to_dense(self) -> nn.Conv2d:
        """nn.Conv2d with the same map."""
        same = {name: getattr(self, name) for name in SAME_IN_DENSE}
        return give_back(self, nn.Conv2d(**same, bias=self.bias is not None, device="meta"))

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
        return _gradient_for_input(b, x, self._filters(V @ S.mT), self._geometry)

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        return (_rows(a).mT @ _rows(g)).mT

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        filters = (b.shape[1], self.in_channels, *self.kernel_size)
        return _gradient_for_filters(b, x, filters, self._geometry).flatten(1).mT

    def whole_product(self, g: Tensor, x: Tensor) -> Tensor:
        kernel = (self.out_channels, self.in_channels, *self.kernel_size)
        return self.as_matrix(_gradient_for_filters(g, x, kernel, self._geometry))

    def core_product(self, b: Tensor, a: Tensor) -> Tensor:
        return _rows(b).mT @ _rows(a)

    def total(self, g: Tensor) -> Tensor:
        rows = _rows(g)
        return rows.mT @ rows.new_ones(rows.shape[0])  # on a CPU ten times faster than a sum over rows

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        text += f", stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{text}, bias={self.bias is not None}"


class SpatialLowRankConv2d(LowRankConv2d):
    """nn.Conv2d with the kernel U S Vᵀ, as a matrix (out_channels * height, in_channels * width).

    A convolution with `rank` filters one row high, followed by one with filters one column wide; all else is
    as in LowRankConv2d, and of a kernel that is one row high it is LowRankConv2d. Its rank r costs
    r (out_channels * height + in_channels * width) parameters; of as many, a trained kernel loses less.
    "Scheme 2" of Jaderberg et al. 2014 (arXiv:1405.3866); as an SVD Tai et al. 2016 (arXiv:1511.06067).
    """

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A kernel (o, i, p, q) as the matrix W with a row for every (o, p) and a column for every (i, q)."""
        return weight.transpose(1, 2).flatten(0, 1).flatten(1)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (out_channels, in_channels, height, width); a new tensor at every call."""
        height, width = self.kernel_size
        kernel = self.factors.dense().view(self.out_channels, height, self.in_channels, width)
        return kernel.transpose(1, 2).contiguous()

    @property
    def _horizontal(self) -> Geometry:
        return {name: (NEUTRAL[name], across) for name, (_, across) in self._geometry.items()}

    @property
    def _vertical(self) -> Geometry:
        return {name: (down, NEUTRAL[name]) for name, (down, _) in self._geometry.items()}

    def _filters(self, V: Tensor) -> Tensor:
        filters = V.mT.unflatten(1, (self.in_channels, 1, self.kernel_size[1]))
        return filters.contiguous(memory_format=CHANNELS_LAST)

    def _columns(self, K: Tensor) -> Tensor:
        """K (m, r) as the filters of the vertical convolution."""
        columns = K.unflatten(0, (self.out_channels, self.kernel_size[0], 1)).permute(0, 3, 1, 2)
        return columns.contiguous(memory_format=CHANNELS_LAST)

    def project(self, x: Tensor, V: Tensor) -> Tensor:
        return F.conv2d(x, self._filters(V), **self._horizontal).contiguous(memory_format=CHANNELS_LAST)

    def lift(self, a: Tensor, U: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(a, self._columns(U @ S), bias, **self._vertical)
        return y.contiguous(memory_format=CHANNELS_LAST)

    def lift_adjoint(self, g: Tensor, U: Tensor, x: Tensor) -> Tensor:
        shape, options = (len(x), U.shape[1], x.shape[2], g.shape[3]), {"dtype": g.dtype, "device": g.device}
        a = _channels_last(torch.empty(shape, **options, memory_format=CHANNELS_LAST))
        return _gradient_for_input(g, a, self._columns(U), self._vertical)

    def project_adjoint(self, b: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
        return _gradient_for_input(b, x, self._filters(V @ S.mT), self._horizontal)

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        columns = (self.out_channels, a.shape[1], self.kernel_size[0], 1)
        return _gradient_for_filters(g, a, columns, self._vertical).transpose(0, 1).flatten(1).mT

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        filters = (b.shape[1], self.in_channels, 1, self.kernel_size[1])
        return _gradient_for_filters(b, x, filters, self._horizontal).flatten(1).mT


def _gradient_for_input(g: Tensor, x: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """What the gradient g for a convolution's output is for its input x, of which only the shape is used."""
    return _backward(g, x, filters, geometry, wanted=0)


def _gradient_for_filters(g: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
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
