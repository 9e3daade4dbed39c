"""What of its weights a trained classifier needs: cuts that raise the loss least, and ranks for a budget.

To second order a change D of a weight W (m, n) raises the loss by a multiple of ‖√G D √A‖². G and A are the
Kronecker factors of the Fisher information: second moments of the gradient for the layer's outputs and of its
inputs (Martens & Grosse 2015; for convolutions Grosse & Martens 2016). Where there are none, √G = √A = I.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.lowrank import LowRank, svd
from dlrt.watching import watching

AT_A_TIME = 16  # the patches of more inputs would fill the memory
DAMPING = 1e-6  # of the largest eigenvalue: directions without any curvature have to stay invertible

Factors = tuple[Tensor, Tensor]  # A (n, n), G (m, m), float64


def kronecker_factors(
    model: nn.Module, layers: Iterable[nn.Linear | nn.Conv2d], inputs: Tensor
) -> dict[nn.Module, Factors]:
    """A and G of each layer, from a classifier's inputs (N, ...), with classes drawn as the model sees them.

    Both in evaluation mode; of a convolution A is a mean over positions, G a sum. A layer without influence
    on the logits has none. ValueError where the model does not give logits (N, classes).
    """
    A: dict[nn.Module, Tensor] = {}
    G: dict[nn.Module, Tensor] = {}
    outputs: Counter[nn.Module] = Counter()

    def watch(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
        patches = _patches(layer, x[0].detach())
        A[layer] = A.get(layer, 0) + (patches.mT @ patches).double()
        outputs[layer] += len(patches)
        if (
            y.requires_grad
        ):  # the hook of a tensor sees the right gradient even if the next layer works in place
            y.register_hook(lambda gradient: add(layer, gradient))

    def add(layer: nn.Module, gradient: Tensor) -> None:
        rows = (gradient.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else gradient).flatten(end_dim=-2)
        G[layer] = G.get(layer, 0) + (rows.mT @ rows).double()

    generator = torch.Generator(inputs.device).manual_seed(0)
    with watching(model, layers, watch), torch.enable_grad():
        for x in inputs.detach().split(AT_A_TIME):
            logits = model(x.requires_grad_())
            if logits.dim() != 2:
                raise ValueError(
                    f"a cut by the loss needs logits (N, classes), got outputs {tuple(logits.shape)}: "
                    "leave inputs out to cut by the weights"
                )
            classes = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            torch.autograd.grad(F.cross_entropy(logits, classes, reduction="sum"), x)
    return {layer: (A[layer] / outputs[layer], G[layer] / len(inputs)) for layer in G}


def _patches(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What the weight as a matrix is multiplied by, a row for each output."""
    if isinstance(layer, nn.Linear):
        return x.flatten(end_dim=-2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    patches = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return patches.movedim(1, -1).flatten(end_dim=-2)


@dataclass(frozen=True, eq=False)
class Terms:
    """W = Σ left_j right_jᵀ, for left (m, k), right (n, k), where the first r terms are the best of rank r.

    To leave some out raises the loss by the sum of their sigma²; the sigma (k,) descend.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor

    @property
    def parameters(self) -> int:
        """What a term costs, m + n."""
        return len(self.left) + len(self.right)

    def matrix(self, rank: int, dtype: torch.dtype) -> LowRank:
        """The first terms, as U S Vᵀ."""
        U, R = torch.linalg.qr(self.left[:, :rank])
        V, T = torch.linalg.qr(self.right[:, :rank])
        return LowRank(U.to(dtype), (R @ T.mT).to(dtype), V.to(dtype))


def terms(W: Tensor, factors: Factors | None = None) -> Terms:
    """W (m, n) taken apart by the singular values of √G W √A, as float64: Eckart-Young in that norm.

    With factors sigma is a share of its norm. The second order holds for small changes only, and without the
    whole of a layer a network is lost, whichever layer it is.
    """
    W = W.double()
    if factors is None:
        P, sigma, Qh = svd(W)
        return Terms(P * sigma, Qh.mT, sigma)
    (A, A_inverse), (G, G_inverse) = map(_roots, factors)
    P, sigma, Qh = svd(G @ W @ A)
    return Terms(G_inverse @ P * sigma, A_inverse @ Qh.mT, sigma / sigma.norm().clamp(min=1e-300))


def _roots(C: Tensor) -> tuple[Tensor, Tensor]:
    """√C and its inverse, slightly damped, for symmetric C; the identity where C is zero."""
    values, vectors = torch.linalg.eigh(C)
    if values[-1] <= 0:
        return torch.eye(len(C)).to(C), torch.eye(len(C)).to(C)
    roots = (values.clamp(min=0) + DAMPING * values[-1]).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def ranks_within(parameters: int, layers: Sequence[Terms]) -> list[int]:
    """The ranks, of at least 1, that cost at most so many parameters in all and lose least.

    Terms are taken in the order of what they are worth per parameter, as in a knapsack, up to the first that
    does not fit. ValueError where ranks of 1 cost more.
    """
    least = sum(layer.parameters for layer in layers)
    if least > parameters:
        raise ValueError(f"ranks of 1 have {least:,} parameters, more than {parameters:,}")
    worth = [
        (loss / layer.parameters, number)
        for number, layer in enumerate(layers)
        for loss in layer.sigma[1:].square().tolist()
    ]
    ranks, left = [1] * len(layers), parameters - least
    for _, number in sorted(worth, reverse=True):
        left -= layers[number].parameters
        if left < 0:
            break
        ranks[number] += 1
    return ranks
