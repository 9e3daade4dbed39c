"""What of its weights a trained classifier needs: cuts that raise the loss least.

To second order a change D of a weight W (m, n) raises the loss by about a multiple of ‖√G D √A‖². G and A are
the Kronecker factors of the Fisher information: second moments of the gradient for the layer's outputs and of
its inputs (Martens & Grosse 2015; for convolutions Grosse & Martens 2016). Without them √G = √A = I.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.hooks import watching
from dlrt.lowrank import LowRank, at_least_single, svd

BATCH_SIZE = 16  # the patches of more inputs would fill the memory
DAMPING = 1e-6  # of the largest eigenvalue: directions without any curvature have to stay invertible

Factors = tuple[Tensor, Tensor]  # A (n, n), G (m, m), float64


def kronecker_factors(
    model: nn.Module, layers: Iterable[nn.Linear | nn.Conv2d], inputs: Tensor, spatial: bool = False
) -> dict[nn.Module, Factors]:
    """A and G of each layer, from a classifier's inputs (N, ...), with classes drawn as the model sees them.

    In evaluation mode. A is a mean over all that the weight is multiplied by, G a sum over all outputs for an
    input. With spatial they are those of a kernel as the matrix of a `SpatialLowRankConv2d`, which is
    multiplied by patches one row high, each of which adds to several outputs. A layer that the logits do not
    depend on has none. ValueError unless the model gives logits (N, classes) of at least two classes.
    """
    A: dict[nn.Module, Tensor] = {}
    G: dict[nn.Module, Tensor] = {}
    count: dict[nn.Module, int] = {}
    probes: list[tuple[nn.Module, Tensor]] = []

    def watch(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rows = _patches(layer, x[0].detach(), spatial)
        A[layer] = A.get(layer, 0) + (rows.mT @ rows).double()
        count[layer] = count.get(layer, 0) + len(rows)
        probes.append((layer, torch.zeros_like(y, requires_grad=True)))
        return y + probes[-1][1]  # the gradient for y, also where the next layer works in place

    generator = torch.Generator(inputs.device).manual_seed(0)
    with watching(model, layers, watch), torch.enable_grad():
        for x in inputs.detach().clone().split(BATCH_SIZE):  # a first layer in place would change the user's
            logits = model(x)
            if logits.dim() != 2 or logits.shape[1] < 2:
                raise ValueError(
                    "a cut by the loss needs logits (N, classes) of two classes at least, got outputs "
                    f"{tuple(logits.shape)}: leave inputs out to cut by the weights"
                )
            p = logits.detach().float().softmax(1)
            classes = torch.multinomial(p, 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, classes, reduction="sum")
            gradients = torch.autograd.grad(loss, [probe for _, probe in probes], allow_unused=True)
            for (layer, _), gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    rows = _gradients(layer, gradient, spatial)
                    G[layer] = G.get(layer, 0) + (rows.mT @ rows).double()
            probes.clear()
    return {layer: (A[layer] / count[layer], G[layer] / len(inputs)) for layer in G}


def _patches(layer: nn.Linear | nn.Conv2d, x: Tensor, spatial: bool) -> Tensor:
    """What the weight as a matrix is multiplied by, a row for each product."""
    if isinstance(layer, nn.Linear):
        return _rows(x, channels=-1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    kernel_size, stride = layer.kernel_size, layer.stride
    if spatial:
        x = x[:, :, _used_rows(layer, x.shape[2])]
        kernel_size, stride = (1, kernel_size[1]), (1, stride[1])
    return _rows(F.unfold(x, kernel_size, dilation=layer.dilation, stride=stride), channels=-2)


def _gradients(layer: nn.Linear | nn.Conv2d, g: Tensor, spatial: bool) -> Tensor:
    """The gradients for those products, from that for the outputs."""
    if isinstance(layer, nn.Linear):
        return _rows(g, channels=-1)
    if spatial:
        height = layer.kernel_size[0]
        place = torch.eye(layer.out_channels * height).to(g)  # (o, p) of g's channel o, p rows further down
        place = place.view(-1, layer.out_channels, height, 1).transpose(0, 1)
        stride, dilation = (layer.stride[0], 1), (layer.dilation[0], 1)
        g = F.conv_transpose2d(g, place, stride=stride, dilation=dilation)
        g = g[..., _used_rows(layer, g.shape[-2]), :]
    return _rows(g, channels=-3)


def _used_rows(layer: nn.Conv2d, height: int) -> list[int]:
    """The rows of a picture of that height, padding and all, that a convolution multiplies by anything."""
    (size, _), (stride, _), (dilation, _) = layer.kernel_size, layer.stride, layer.dilation
    outputs = (height - dilation * (size - 1) - 1) // stride + 1
    return sorted({i * stride + p * dilation for i in range(outputs) for p in range(size)})


def _rows(x: Tensor, channels: int) -> Tensor:
    """A row of channels for all else, in single precision at least: products of halves would overflow."""
    x = x.movedim(channels, -1)
    return at_least_single(x.reshape(-1, x.shape[-1]))


@dataclass(frozen=True, eq=False)
class Terms:
    """W = Σ left_j right_jᵀ, for left (m, k), right (n, k), where the first r terms are the best of rank r.

    sigma (k,) descends; to leave terms out costs the sum of their sigma², as a share of the whole layer's.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor

    def matrix(self, rank: int, dtype: torch.dtype) -> LowRank:
        """The first terms, as U S Vᵀ."""
        U, R = torch.linalg.qr(self.left[:, :rank])
        V, T = torch.linalg.qr(self.right[:, :rank])
        return LowRank(U.to(dtype), (R @ T.mT).to(dtype), V.to(dtype))


def terms(W: Tensor, factors: Factors | None = None) -> Terms:
    """W (m, n) taken apart by the singular values of √G W √A, as float64: Eckart-Young in that norm.

    They are shares of their norm. The second order holds for small changes only, and without the whole of a
    layer a network is lost, whichever layer it is; before a norm the scale of a weight means nothing anyway.
    """
    W = W.double()
    if factors is None:
        P, sigma, Qh = svd(W)
        left, right = P * sigma, Qh.mT
    else:
        (A, A_inverse), (G, G_inverse) = map(_roots, factors)
        P, sigma, Qh = svd(G @ W @ A)
        left, right = G_inverse @ P * sigma, A_inverse @ Qh.mT
    return Terms(left, right, sigma / sigma.norm() if sigma.any() else sigma)


def _roots(C: Tensor) -> tuple[Tensor, Tensor]:
    """√C and its inverse, slightly damped, for symmetric C; the identity where C is zero."""
    values, vectors = torch.linalg.eigh(C)
    if values[-1] <= 0:
        return torch.eye(len(C)).to(C), torch.eye(len(C)).to(C)
    roots = (values.clamp(min=0) + DAMPING * values[-1]).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
