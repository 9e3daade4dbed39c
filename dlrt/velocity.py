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

from dlrt.augmented import AugmentedBasis
from dlrt.integrators import pad
from dlrt.lowrank import LowRank, svd


@dataclass(frozen=True, eq=False)
class Tangent:
    """M (m, n) in the tangent space at U S Vᵀ, by MV (m, r), MU (n, r) and core = Uᵀ M V (r, r).

    core counts where Uᵀ MV differs from it: weight decay, or a penalty on S, is written into core alone.
    Where bases rest there is no MV and no MU.
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
        VtX = self.V.mT @ X
        twice = self.U.mT @ self.MV + self.MU.mT @ self.V  # their block is core's alone
        return self.MV @ VtX + self.U @ (self.MU.mT @ X + (self.core - twice) @ VtX)


Velocity = Tangent | LowRank  # a LowRank in augmented bases, whose S is D


def coefficients(M: Velocity, Y_hat: LowRank) -> Tensor:
    """D = Ûᵀ M V̂ for a velocity in the bases of Ŷ, or in those that Ŷ augments."""
    if isinstance(M, LowRank):
        return M.S
    r, s = M.core.shape
    D = pad(M.core, Y_hat.S.shape)
    if Y_hat.S.shape != (r, s):
        D[:r, s:], D[r:, :s] = _added_times(Y_hat.V, M.MU).mT, _added_times(Y_hat.U, M.MV)
    return D


def _added_times(basis: Tensor | AugmentedBasis, X: Tensor) -> Tensor:
    """U1ᵀ X for a basis [U U1], where U has as many columns as X."""
    return basis[:, X.shape[1] :].mT @ X if isinstance(basis, Tensor) else basis.added_times(X)


def carried(M: Velocity, Y_hat: LowRank, P: Tensor, Q: Tensor) -> tuple[Tensor, ...]:
    """The bases Û P and V̂ Q, and MV, MU and core of the tangent part of M in them."""
    D = coefficients(M, Y_hat)
    core = P.mT @ D @ Q
    if isinstance(M, LowRank):
        # side by side one product is faster than two; the velocity, which stays, must not keep both alive
        U, MV = (Y_hat.U @ torch.cat([P, D @ Q], dim=1)).chunk(2, dim=1)
        V, MU = (Y_hat.V @ torch.cat([Q, D.mT @ P], dim=1)).chunk(2, dim=1)
        return U, V, MV.contiguous(), MU.contiguous(), core
    r, s = M.core.shape  # M may have parts outside the augmented bases
    MV = M.MV @ Q[:s] + M.U @ (D[:r] @ Q - M.U.mT @ M.MV @ Q[:s])
    MU = M.MU @ P[:r] + M.V @ (D[:, :s].mT @ P - M.V.mT @ M.MU @ P[:r])
    return Y_hat.U @ P, Y_hat.V @ Q, MV, MU, core


def sgd(D: Tensor) -> Tensor:
    """D itself. A change of basis D → Pᵀ D Q changes the direction likewise."""
    return D


def msign(D: Tensor) -> Tensor:
    """P Qᵀ for D = P Σ Qᵀ: the orthogonal polar factor on the range of D.

    Singular values that are rounding errors stay out. msign(Pᵀ D Q) = Pᵀ msign(D) Q for orthonormal P, Q.
    Jordan et al. 2024, Muon.
    """
    P, sigma, Qh = svd(D)
    rounding = max(D.shape) * torch.finfo(D.dtype).eps
    return (P * (sigma > rounding * sigma[0])) @ Qh


def adam(D: Tensor, DG: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Entries of the mean D over the root of the mean squares of DG, both corrected for a start from zero.

    D and DG (k, l) are the coefficients of velocity and gradient. An entry in a new direction has no past
    squares: it begins with the larger of DG² and the mean's square, so that it moves by at most h. `weights`
    counts for each entry how much of a mean its squares are. The direction depends on the bases: only an
    exchange or mirroring of basis vectors changes it likewise. Kingma & Ba 2015.
    """
    beta1, beta2 = betas
    step = state["step"] = state.get("step", 0) + 1
    none = torch.zeros_like(DG)
    squares, weights = (pad(state[key], DG.shape) if key in state else none for key in ("squares", "weights"))
    mean = D / (1 - beta1**step)
    of_now = torch.where(weights > 0, DG.square(), torch.maximum(DG.square(), mean.square()))
    squares, weights = squares.lerp(of_now, 1 - beta2), weights.lerp(torch.ones_like(DG), 1 - beta2)
    state["squares"], state["weights"] = squares, weights
    return mean / ((squares / weights).sqrt() + eps)


@dataclass(frozen=True)
class Rule:
    """What S moves along, as a function of the small matrix D (k, l) alone, and how far.

    Weight decay that is not `decoupled` is part of D. `scaled`: the step of an m x n weight is √max(1, m/n)
    times as long, so that its entries change alike.
    """

    direction: Callable[[Tensor], Tensor]
    share: float = 1.0  # of lr, which the step size is by default
    decoupled: bool = False
    scaled: bool = False

    def __call__(self, D: Tensor) -> Tensor:
        """The direction. ValueError for one of another shape; D stays what it is."""
        direction = self.direction(D.clone())
        if direction.shape != D.shape:
            made, asked = tuple(direction.shape), tuple(D.shape)
            raise ValueError(f"an update rule must give a matrix of the shape of D, {asked}, got {made}")
        return direction

    def scale(self, shape: tuple[int, int]) -> float:
        """By which the step of a weight of that shape is longer."""
        return max(1.0, shape[0] / shape[1]) ** 0.5 if self.scaled else 1.0


RULES = {"sgd": Rule(sgd), "muon": Rule(msign, share=0.3, decoupled=True, scaled=True)}
UPDATES = (*RULES, "adam")


def rule_of(update: str) -> Rule:
    """The rule of that name; "adam", which has a memory, has step size and decay of "sgd"."""
    return RULES["sgd" if update == "adam" else update]


def update_share(rule: Rule, update_lr: float | None, lr: float) -> float:
    """update_lr over lr, which it follows in proportion. ValueError where lr = 0 would forget it."""
    if update_lr is None:
        return rule.share
    if update_lr and not lr:
        raise ValueError(
            f"update_lr follows lr in proportion, so lr must be above 0, got lr {lr} and {update_lr}"
        )
    return update_lr / lr if update_lr else 0.0


def rotate_squares(state: dict[str, Any], P: Tensor, Q: Tensor) -> None:
    """Write the mean of squares in the bases Û P, V̂ Q: exact for entries without mean and correlation."""
    for key in ("squares", "weights"):
        if key in state:
            # a layer whose bases were augmented may not have stepped since
            state[key] = P.square().mT @ pad(state[key], (len(P), len(Q))) @ Q.square()
