"""What of its weights a trained classifier needs: cuts that raise the loss least.

To second order a change D of a weight W (m, n) raises the loss by about a multiple of ‖√G D √A‖². G and A are
the Kronecker factors of the Fisher information: second moments of the gradient for the layer's outputs and of
its inputs (Martens & Grosse 2015; for convolutions Grosse & Martens 2016). Without them √G = √A = I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.hooks import watching
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank, at_least_single, normalized, svd

BATCH_SIZE = 16  # the patches of more inputs would fill the memory
DAMPING = 1e-6  # of the norm: directions without any curvature have to stay invertible

KroneckerFactors = tuple[Tensor, Tensor]  # A (n, n), G (m, m), float64


def kronecker_factors(
    model: nn.Module, kinds: Mapping[nn.Module, type[LowRankLayer]], inputs: Tensor
) -> dict[nn.Module, KroneckerFactors]:
    """A and G of each dense layer, from a classifier's inputs (N, ...); the model draws the classes.

    In evaluation mode, and of the weight as the matrix of that kind of low-rank layer: A is a mean over all
    that it is multiplied by, G a sum over all products for an input. A layer that the logits do not depend on
    has none. ValueError unless the model gives logits (N, classes) of at least two classes.
    """
    A: dict[nn.Module, Tensor] = {}
    G: dict[nn.Module, Tensor] = {}
    count: dict[nn.Module, int] = {}
    probes: list[tuple[nn.Module, Tensor]] = []

    def watch(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
        rows = at_least_single(kinds[layer].input_rows(layer, x[0].detach()))  # products of halves overflow
        A[layer] = A.get(layer, 0) + (rows.mT @ rows).double()
        count[layer] = count.get(layer, 0) + len(rows)
        probes.append((layer, torch.zeros_like(y, requires_grad=True)))
        return y + probes[-1][1]  # the gradient for y, also where the next layer works in place

    generator = torch.Generator(inputs.device).manual_seed(0)
    with watching(model, kinds, watch), torch.enable_grad():
        for x in inputs.detach().clone().split(BATCH_SIZE):  # a first layer in place would change the user's
            logits = model(x)
            if logits.dim() != 2 or logits.shape[1] < 2:
                raise ValueError(
                    "a cut by the loss needs logits (N, classes) of two classes at least, got outputs "
                    f"{tuple(logits.shape)}: leave inputs out to cut by the weights"
                )
            if not probes:
                return {}  # none of these layers was called
            p = logits.detach().float().softmax(1)
            classes = torch.multinomial(p, 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, classes, reduction="sum")
            gradients = torch.autograd.grad(loss, [probe for _, probe in probes], allow_unused=True)
            for (layer, _), gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    rows = at_least_single(kinds[layer].output_rows(layer, gradient))
                    G[layer] = G.get(layer, 0) + (rows.mT @ rows).double()
            probes.clear()
    return {layer: (A[layer] / count[layer], G[layer] / len(inputs)) for layer in G}


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


def terms(W: Tensor, factors: KroneckerFactors | None = None, damping: float = DAMPING) -> Terms:
    """W (m, n) taken apart by the singular values of √G W √A: Eckart-Young in that norm.

    They are shares of their norm. The second order holds for small changes only, and without the whole of a
    layer a network is lost, whichever layer it is; before a norm the scale of a weight means nothing anyway.
    """
    if factors is None:
        P, sigma, Qh = svd(W)
        left, right = P, Qh.mT
    else:
        root_A, root_G = (_root(C, damping) for C in factors)
        P, sigma, Qh = svd(root_G @ W @ root_A.mT)
        left = torch.linalg.solve_triangular(root_G, P, upper=True)
        right = torch.linalg.solve_triangular(root_A, Qh.mT, upper=True)
    shares = normalized(sigma)
    return Terms(left * sigma, right, shares / shares.norm().clamp(min=1))


def _root(C: Tensor, damping: float) -> Tensor:
    """R with Rᵀ R = C, slightly damped, up to a factor; triangular, which serves as well as √C."""
    norm = torch.linalg.matrix_norm(C).clamp(min=torch.finfo(C.dtype).tiny)  # the same in all bases
    damped = C / norm + damping * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.cholesky(damped).mT
