"""The integrators for a field, Y' = F(t, Y): one Runge-Kutta step for each of their sub-equations.

In `integrators` F does not change within a step, as an increment or a gradient does not, and a single step of
Euler's solves each sub-equation exactly. Here F depends on Y, and the equations

    K' = F(t, K Vᵀ) V,    L' = F(t, U Lᵀ)ᵀ U,    S' = Uᵀ F(t, U S Vᵀ) V

take one step of the classical Runge-Kutta method each. F(t, Y) may be whatever has the products F @ V and
F.T @ U: a matrix, or a `LowRank` where a field makes factors (whose bases need not be orthonormal then).
It must take a Y with bases that are not orthonormal, too: K Vᵀ and U Lᵀ come as such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlrt.integrators import Operator, augment, galerkin, project, times
from dlrt.lowrank import LowRank, qr, truncate

Field = Callable[[float, LowRank], Operator]


def bug(Y: LowRank, F: Field, t: float, h: float) -> LowRank:
    """The basis-update & Galerkin integrator at fixed rank, from t to t + h. Ceruti & Lubich 2022."""
    U1, _ = qr(k_step(Y, F, t, h))
    V1, _ = qr(k_step(Y.T, transposed(F), t, h))
    return LowRank(U1, s_step(project(Y, U1, V1), F, t, h), V1)


def augmented_bug(
    Y: LowRank, F: Field, t: float, h: float, tau: float | None = None, max_rank: int | None = None
) -> LowRank:
    """The rank-adaptive BUG integrator, from t to t + h. Ceruti, Kusch & Lubich 2022."""
    return truncate(augmented_step(Y, F, t, h), tau, 1, max_rank)


def midpoint_bug(
    Y: LowRank, F: Field, t: float, h: float, tau: float | None = None, max_rank: int | None = None
) -> LowRank:
    """The BUG integrator of second order, from t to t + h. Ceruti, Einkemmer, Kusch & Lubich 2024."""
    half = augmented_step(Y, F, t, h / 2)  # not truncated: its bases hold those of Y
    F_half = F(t + h / 2, half)
    Y_hat = augment(project(Y, half.U, half.V), times(F_half, half.V), times(F_half.T, half.U))
    return truncate(LowRank(Y_hat.U, s_step(Y_hat, F, t, h), Y_hat.V), tau, 1, max_rank)


def augmented_step(Y: LowRank, F: Field, t: float, h: float) -> LowRank:
    """K- and L-step, and the S-step in the bases that hold the old and the new ones."""
    Y_hat = augment(Y, k_step(Y, F, t, h), k_step(Y.T, transposed(F), t, h))
    return LowRank(Y_hat.U, s_step(Y_hat, F, t, h), Y_hat.V)


def projector_splitting(Y: LowRank, F: Field, t: float, h: float, adjoint: bool = False) -> LowRank:
    """Projector splitting KSL, or LSK with adjoint=True, from t to t + h. Lubich & Oseledets 2014."""
    if adjoint:
        return projector_splitting(Y.T, transposed(F), t, h).T
    U1, S_hat = qr(k_step(Y, F, t, h))
    S_tilde = s_step(LowRank(U1, S_hat, Y.V), F, t, h, sign=-1)  # the S-step goes back
    V1, S1t = qr(k_step(LowRank(U1, S_tilde, Y.V).T, transposed(F), t, h))
    return LowRank(U1, S1t.mT, V1)


def strang(Y: LowRank, F: Field, t: float, h: float) -> LowRank:
    """Half a step KSL, half a step LSK: projector splitting of second order. Lubich & Oseledets 2014."""
    half = projector_splitting(Y, F, t, h / 2)
    return projector_splitting(half, F, t + h / 2, h / 2, adjoint=True)


def k_step(Y: LowRank, F: Field, t: float, h: float) -> Tensor:
    """K (m, r) at t + h for K' = F(t, K Vᵀ) V from K = U S; that of Yᵀ is the L-step."""
    identity = torch.eye(Y.V.shape[1], dtype=Y.S.dtype, device=Y.S.device)
    return rk4(lambda t, K: times(F(t, LowRank(K, identity, Y.V)), Y.V), Y.U @ Y.S, t, h)


def s_step(Y: LowRank, F: Field, t: float, h: float, sign: int = 1) -> Tensor:
    """S (r, r) at t + h for S' = ± Uᵀ F(t, U S Vᵀ) V in the bases of Y."""

    def slope(t: float, S: Tensor) -> Tensor:
        at = LowRank(Y.U, S, Y.V)
        return sign * galerkin(F(t, at), at)

    return rk4(slope, Y.S, t, h)


def transposed(F: Field) -> Field:
    """The field of the transpose, (Yᵀ)' = F(t, Y)ᵀ."""
    return lambda t, Y: F(t, Y.T).T


def rk4(slope: Callable[[float, Tensor], Tensor], X: Tensor, t: float, h: float) -> Tensor:
    """One step of the classical Runge-Kutta method of order four for X' = slope(t, X)."""
    k1 = slope(t, X)
    k2 = slope(t + h / 2, X + h / 2 * k1)
    k3 = slope(t + h / 2, X + h / 2 * k2)
    k4 = slope(t + h, X + h * k3)
    return X + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
