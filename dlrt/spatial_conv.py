"""Convolutions that are low-rank across space: a horizontal convolution, and then a vertical one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dlrt.layers import CHANNELS_LAST, Geometry, LowRankConv2d, gradient_for_filters, gradient_for_input

NEUTRAL = {"stride": 1, "padding": 0, "dilation": 1}


class SpatialLowRankConv2d(LowRankConv2d):
    """nn.Conv2d with the kernel U S Vᵀ, as a matrix (out_channels * height, in_channels * width).

    A convolution with `rank` filters one row high, followed by one with filters one column wide; all else is
    as in LowRankConv2d, and of a kernel that is one row high it is LowRankConv2d. Its rank r costs
    r (out_channels * height + in_channels * width) parameters, and trained kernels lose less at as many.
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
        (samples, _, height, _), width = x.shape, g.shape[3]
        return gradient_for_input(g, (samples, U.shape[1], height, width), self._columns(U), self._vertical)

    def project_adjoint(self, b: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
        return gradient_for_input(b, x.shape, self._filters(V @ S.mT), self._horizontal)

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        columns = (self.out_channels, a.shape[1], self.kernel_size[0], 1)
        return gradient_for_filters(g, a, columns, self._vertical).transpose(0, 1).flatten(1).mT

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        filters = (b.shape[1], self.in_channels, 1, self.kernel_size[1])
        return gradient_for_filters(b, x, filters, self._horizontal).flatten(1).mT
