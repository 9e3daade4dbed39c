"""Convolutions whose kernel lives as W = U S Vᵀ, as a matrix or spatially separable.

The rows of x in y = x V Sᵀ Uᵀ + bias are patches of pictures, which are never unfolded: x V is a convolution
with r filters, and what follows is another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.layers import LowRankLayer, rows_of
from dlrt.replacing import give_back, take_over
from dlrt.thin_convolutions import (
    ConvolutionMap,
    Thin,
    along,
    channels_last,
    is_channels_last,
    laid_out_as,
    with_gradient_laid_out,
)

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
    without groups. Input (batch, in_channels, h, w) or (in_channels, h, w). The output has its memory format,
    or that of the model where that is channels-last. ValueError where the rank is impossible.
    """

    groups, transposed, output_padding = 1, False, (0, 0)  # for whoever reads them as of nn.Conv2d
    directions = (True, True), (False, False)
    """(vertical, horizontal): what each of the two convolutions has of the kernel and its geometry."""
    _conv_forward = nn.Conv2d._conv_forward  # a dense layer's `forward` that was taken before calls it

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, device="meta", **options)  # checks them all
        super().__init__(*self.as_matrix(dense.weight).shape, rank, out_channels, bias, device, dtype)
        for name in SAME_IN_DENSE:
            setattr(self, name, getattr(dense, name))
        # a kernel of one pixel with a stride only leaves pixels out, which are left out before
        self._every = tuple(s if k == 1 else 1 for k, s in zip(self.kernel_size, self.stride, strict=True))
        self._reversed_padding_repeated_twice = list(dense._reversed_padding_repeated_twice)
        pads_itself = padding_mode == "zeros" and not isinstance(padding, str) and self._every == (1, 1)
        self._pads_before = not pads_itself
        stride = tuple(s // every for s, every in zip(self.stride, self._every, strict=True))
        inner_padding = self.padding if pads_itself else (0, 0)
        self._channels_last = False  # whether outputs are so, whatever inputs are
        self._geometry = {"stride": stride, "padding": inner_padding, "dilation": self.dilation}
        geometry = {"size": self.kernel_size, **self._geometry}
        first, second = (along(geometry, directions) for directions in self.directions)
        # the two convolutions that y = x V Sᵀ Uᵀ consists of
        self.thin = Thin(self.in_channels, **first), Thin(self.out_channels, **second)

    @classmethod
    def in_place_of(cls, conv: nn.Conv2d) -> LowRankConv2d:
        """A layer of rank 1, whose factors are still to be set, that shares all else with a dense one."""
        if conv.groups != 1:
            raise ValueError(
                f"a low-rank convolution needs groups = 1, got {conv.groups}: leave this layer dense"
            )
        same = {name: getattr(conv, name) for name in SAME_IN_DENSE}
        layer = take_over(cls(**same, rank=1, bias=conv.bias is not None), conv)
        layer._channels_last = is_channels_last(conv.weight)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """nn.Conv2d with the same map."""
        same = {name: getattr(self, name) for name in SAME_IN_DENSE}
        dense = give_back(self, nn.Conv2d(**same, bias=self.bias is not None, device="meta"))
        return dense.to(memory_format=self._memory_format)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (out_channels, in_channels, height, width); a new tensor at every call."""
        return self._matrix().unflatten(1, (self.in_channels, *self.kernel_size))

    def _apply(self, fn, recurse: bool = True):
        """`model.to(memory_format=torch.channels_last)` reaches this layer as it would reach a kernel."""
        kernel = torch.empty(2, 2, 2, 2)
        self._channels_last = is_channels_last(fn(kernel.to(memory_format=self._memory_format)))
        return super()._apply(fn, recurse)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._channels_last else torch.contiguous_format

    def thin_layers(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        geometry = {name: getattr(self, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        first_options, second_options = (along(geometry, directions) for directions in self.directions)
        first_options |= {"padding_mode": self.padding_mode, "bias": False, "device": "meta"}
        mode = self.padding_mode if any(self.directions[1]) else "zeros"  # there may be nothing to pad
        second_options |= {"padding_mode": mode, "bias": self.bias is not None, "device": "meta"}
        first = nn.Conv2d(self.in_channels, self.rank, **first_options)
        return first, nn.Conv2d(self.rank, self.out_channels, **second_options)

    @staticmethod
    def input_rows(dense: nn.Conv2d, x: Tensor) -> Tensor:
        """Patches (products, in_channels * height * width) of pictures."""
        geometry = {"stride": dense.stride, "dilation": dense.dilation}
        return rows_of(F.unfold(padded(dense, x), dense.kernel_size, **geometry), -2)

    @staticmethod
    def output_rows(dense: nn.Conv2d, g: Tensor) -> Tensor:
        return rows_of(g, -3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4:
            raise ValueError(
                f"the input must have the shape (N, {self.in_channels}, H, W) or ({self.in_channels}, H, W), "
                f"got {tuple(x.shape)}"
            )
        is_laid_out = is_channels_last(x)
        as_channels_last = self._channels_last or is_laid_out
        # a convolution gives the gradient the format of channels-last pictures, if not in double precision
        if not is_laid_out or self._pads_before or self._every != (1, 1) or x.dtype == torch.float64:
            x = with_gradient_laid_out(x)
        if self._pads_before:
            x = padded(self, x)
        if self._every != (1, 1):
            x = x[:, :, :: self._every[0], :: self._every[1]]
        if as_channels_last or x.device.type == "cpu":  # where any other layout takes up to 20 times as long
            x = channels_last(x)
        y = super().forward(x)
        return y if as_channels_last else y.contiguous()

    def dense_map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, laid_out_as(x, weight), self.bias, **self._geometry)

    def plain_map(self, x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        first, second = self.thin
        return second.convolve(first.convolve(x, first.inward(V)), second.outward(U @ S), self.bias)

    def map(self, x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return ConvolutionMap.apply(x, U, S, V, self.bias, *self.thin)[0]

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

    directions = (False, True), (True, False)

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A kernel (o, i, p, q) as the matrix W with a row for every (o, p) and a column for every (i, q)."""
        return weight.transpose(1, 2).flatten(0, 1).flatten(1)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (out_channels, in_channels, height, width); a new tensor at every call."""
        height, width = self.kernel_size
        kernel = self._matrix().view(self.out_channels, height, self.in_channels, width)
        return kernel.transpose(1, 2)

    @classmethod
    def input_rows(cls, dense: nn.Conv2d, x: Tensor) -> Tensor:
        """Patches (products, in_channels * width) one row high, each of which adds to several outputs."""
        x = padded(dense, x)
        x = x[..., cls._used_rows(dense, x.shape[-2]), :]
        geometry = {"stride": (1, dense.stride[1]), "dilation": dense.dilation}
        return rows_of(F.unfold(x, (1, dense.kernel_size[1]), **geometry), -2)

    @classmethod
    def output_rows(cls, dense: nn.Conv2d, g: Tensor) -> Tensor:
        height = dense.kernel_size[0]
        place = torch.eye(dense.out_channels * height).to(g)  # (o, p) of g's channel o, p rows further down
        place = place.view(-1, dense.out_channels, height, 1).transpose(0, 1)
        g = F.conv_transpose2d(g, place, stride=(dense.stride[0], 1), dilation=(dense.dilation[0], 1))
        return rows_of(g[..., cls._used_rows(dense, g.shape[-2]), :], -3)

    @staticmethod
    def _used_rows(dense: nn.Conv2d, height: int) -> list[int]:
        """The rows of a padded picture of that height that a convolution multiplies by anything."""
        (size, _), (stride, _), (dilation, _) = dense.kernel_size, dense.stride, dense.dilation
        outputs = (height - dilation * (size - 1) - 1) // stride + 1
        return sorted({i * stride + p * dilation for i in range(outputs) for p in range(size)})


def padded(convolution: nn.Conv2d | LowRankConv2d, x: Tensor) -> Tensor:
    """Pictures with the padding that a convolution gives them."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return F.pad(x, convolution._reversed_padding_repeated_twice, mode)
