"""The velocity of a low-rank weight, a tangent vector that follows the bases, and the rules that step S.

Gradient and velocity M (m, n) are known by their products with the bases, as many numbers as the bases have:

    M @ X = MV (Vᵀ X) + U (MUᵀ X) - U (Uᵀ MV) (Vᵀ X),    MV = M V,    MU = Mᵀ U.

A rule acts on the small matrix D = Ûᵀ M V̂ only. Momentum on the manifold: arXiv 2506.17475.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlrt.integrators import Operator, pad
from dlrt.lowrank import LowRank, svd


@dataclass(frozen=True, eq=False)
class Tangent:
    """M (m, n) in the tangent space at U S Vᵀ, by MV (m, r), MU (n, r) and core = Uᵀ M V (r, r).

    core may hold more than Uᵀ MV: what somebody added to S.grad alone, such as a penalty on S. Where bases
    rest there is no MV and no MU.
    """

    U: Tensor
    V: Tensor
    MV: Tensor | None
    MU: Tensor | None
    core: Tensor

    @property
    def T(self) -> Tangent:
        return Tangent(self.V, self.U, self.MU, self.MV, self.core.mT)

    def __matmul__(self, X: Tensor) -> Tensor:
        if X is self.V:
            return self.MV
        VtX = self.V.mT @ X
        twice = (
            self.U.mT @ self.MV + self.MU.mT @ self.V
        )  # both, or their difference would double at each use
        inner = self.MU.mT @ X + (self.core - twice) @ VtX
        return torch.addmm(self.MV @ VtX, self.U, inner)


def tangent_at(M: Operator, Y: LowRank) -> Tangent:
    """The projection of M onto the tangent space at Y: its products with the bases."""
    if isinstance(M, Tangent) and M.U is Y.U and M.V is Y.V:
        return M
    MV = M @ Y.V
    return Tangent(Y.U, Y.V, MV, M.T @ Y.U, Y.U.mT @ MV)


def sgd(D: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """D itself. A change of basis D → Pᵀ D Q changes the direction likewise."""
    return D


def muon(D: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """msign(D) = P Qᵀ for D = P Σ Qᵀ: the orthogonal polar factor on the range of D.

    Singular values that are rounding errors stay out. msign(Pᵀ D Q) = Pᵀ msign(D) Q for orthonormal P, Q.
    Jordan et al. 2024, Muon.
    """
    P, sigma, Qh = svd(D)
    rounding = max(D.shape) * torch.finfo(D.dtype).eps
    return (P * (sigma > rounding * sigma[0])) @ Qh


def adam(D: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Entries of the mean D over the root of the mean squares, both corrected for their start from zero.

    It depends on the bases: only an exchange or mirroring of basis vectors changes the direction likewise.
    Kingma & Ba 2015.
    """
    beta1, beta2 = group["betas"]
    mean, squares = D / (1 - beta1 ** state["step"]), state["squares"] / (1 - beta2 ** state["step"])
    return mean / (squares.sqrt() + group["eps"])


RULES: dict[str, Callable[[Tensor, dict[str, Any], dict[str, Any]], Tensor]] = {
    "sgd": sgd,
    "muon": muon,
    "adam": adam,
}


def add_squares(state: dict[str, Any], DG: Tensor, beta2: float) -> None:
    """Take the coefficients DG (k, l) of a gradient into the mean of squares; new directions have no past."""
    state["step"] = state.get("step", 0) + 1
    squares = pad(state["squares"], DG.shape) if "squares" in state else torch.zeros_like(DG)
    state["squares"] = squares.lerp(DG.square(), 1 - beta2)


def turn_squares(state: dict[str, Any], Y_hat: LowRank, Y1: LowRank) -> None:
    """Write the mean of squares in the bases of Y1: exact for entries without mean and correlation."""
    if "squares" in state:
        P, Q = Y_hat.U.mT @ Y1.U, Y_hat.V.mT @ Y1.V
        state["squares"] = P.square().mT @ state["squares"] @ Q.square()
