"""The two thin convolutions that a low-rank one is made of: geometry, memory formats, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlrt.products import in_type_of

# what a convolution has along a direction in which it does nothing
NEUTRAL = {"size": 1, "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


def along(geometry: dict[str, Any], directions: tuple[bool, bool]) -> dict[str, Any]:
    """The geometry of a convolution along some of (vertical, horizontal), neutral along the others.

    Padding that is a word stays.
    """
    return {
        name: sizes
        if isinstance(sizes, str)
        else tuple(s if wanted else NEUTRAL[name] for s, wanted in zip(sizes, directions, strict=True))
        for name, sizes in geometry.items()
    }


class Thin(NamedTuple):
    """The geometry of one of the two thin convolutions; sizes are (vertical, horizontal)."""

    channels: int
    """That come in where it is the first, that go out where it is the second; r are on its other side."""
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def inward(self, V: Tensor) -> Tensor:
        """V (n, r) as r filters (r, channels, *size)."""
        return V.mT.unflatten(1, (self.channels, *self.size))

    def outward(self, U: Tensor) -> Tensor:
        """U (m, r) as filters (channels, r, *size) for each output."""
        return U.unflatten(0, (self.channels, *self.size)).permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, filters_for(x, filters), bias, self.stride, self.padding, self.dilation)

    def backward(self, g: Tensor, x: Tensor, filters: Tensor, of_x: bool, of_filters: bool) -> list[Tensor]:
        """The gradients for x and filters of `convolve`, where wanted, from the gradient g for its output."""
        geometry = (self.stride, self.padding, self.dilation, False, [0, 0], 1, [of_x, of_filters, False])
        g, filters = laid_out_as(x, g), filters_for(x, filters)
        return torch.ops.aten.convolution_backward(g, x, filters, None, *geometry)[:2]


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """A tensor in the memory format of the pictures x."""
    return channels_last(other) if is_channels_last(x) else other.contiguous()


def filters_for(x: Tensor, filters: Tensor) -> Tensor:
    """Filters as torch takes them: it lays them out as x, but on a GPU x as filters in channels-last."""
    return filters if is_channels_last(x) else filters.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, and not only since there is one pixel."""
    return x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def channels_last(x: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in memory as (N, H, W, C), with strides that say so even where a size is 1.

    vmap knows no `contiguous` with a memory format, and torch fails at other strides of such sizes.
    """
    rows = x.permute(0, 2, 3, 1)
    if rows.is_contiguous() and 1 not in rows.shape:
        return x
    rows = rows.contiguous()
    return rows.flatten().view(rows.shape).permute(0, 3, 1, 2)


def with_gradient_laid_out(x: Tensor) -> Tensor:
    """x itself, whose gradient comes out in the memory format of x: what is before may call `view` on it."""
    if is_channels_last(x):
        return with_gradient_laid_out(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.flatten(1).unflatten(1, x.shape[1:])  # backwards a reshape, which makes rows contiguous


def total(g: Tensor) -> Tensor:
    """The sum of g for every channel, as a product of matrices, which on a CPU is ten times faster."""
    rows = g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
    return rows.mT @ rows.new_ones(len(rows))


class ConvolutionMap(torch.autograd.Function):
    """y = x V Sᵀ Uᵀ + bias for pictures x, by a first and a second thin convolution, and a = x V."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, first: Thin, second: Thin
    ) -> tuple[Tensor, Tensor]:
        a = first.convolve(x, first.inward(V))
        return second.convolve(a, second.outward(U @ S), bias), a

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.first, ctx.second = inputs[5:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of a, which would be zeros
        ctx.save_for_backward(*inputs[:4], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        of_x, of_U, of_S, of_V, of_bias, *_ = ctx.needs_input_grad
        x, U, S, V, a = in_type_of(g, ctx.saved_tensors)
        first, second = ctx.first, ctx.second
        # the filters of U make b = g U of g; their own gradient is gᵀ x V = G V
        b, GV = second.backward(g, a, second.outward(U), of_x or of_V, of_U or of_S)
        GV = GV.permute(0, 2, 3, 1).flatten(0, 2) if of_U or of_S else None
        x_grad = GtU = None
        if of_x or of_V:
            # of filters V Sᵀ comes the gradient for x; their own is xᵀ b = Gᵀ U, whatever they are
            filters = first.inward(V @ S.mT if of_x else V)
            x_grad, GtU = first.backward(b, x, filters, of_x, of_V)
        GtU = GtU.flatten(1).mT if of_V else None
        S_grad, g_sum = U.mT @ GV if of_S else None, total(g) if of_bias else None
        return x_grad, GV if of_U else None, S_grad, GtU, g_sum, None, None
