"""One step of a low-rank integrator for Y' = F on the manifold of rank-r matrices, Y = U S Vᵀ.

F (m, n) is used only through the products F @ V and F.T @ U, so it may be a matrix (for data, h = 1 and the
increment A(t + h) - A(t)) or an operator (for a layer, the negative velocity, see `velocity.Tangent`). Every
function takes Y at t and gives Y1 at t + h; Koch & Lubich 2007 is the flow that all of them approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlrt.augmented import augmented, formed
from dlrt.lowrank import LowRank, qr, truncate


class Operator(Protocol):
    """What an integrator needs of F (m, n): F @ V for V (n, k) and F.T @ U for U (m, k)."""

    @property
    def T(self) -> Operator: ...

    def __matmul__(self, X: Tensor) -> Tensor: ...


Direction = Callable[[Tensor, LowRank], Tensor]  # in which S moves, of D and Ŷ, see `parallel_step`


def parallel_bug(
    Y: LowRank,
    F: Operator,
    h: float = 1.0,
    tau: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> LowRank:
    """The parallel integrator: K-, L- and S-step at once, all at Y. Ceruti, Kusch & Lubich 2024.

    It is the truncated projected Euler step T(Y + h P_Y F), P_Y F = U Uᵀ F + F V Vᵀ - U Uᵀ F V Vᵀ. The rank
    may double before truncation to the relative tolerance tau; tau = None truncates to max_rank only.
    """
    Y_hat, _ = parallel_step(Y, times(F, Y.V), times(F.T, Y.U), h)
    return truncate(Y_hat, tau, min_rank, max_rank)


def augmented_bug(
    Y: LowRank,
    F: Operator,
    h: float = 1.0,
    tau: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> LowRank:
    """The rank-adaptive BUG integrator. Ceruti, Kusch & Lubich 2022.

    As `parallel_bug`, but the S-step sees all of F in the augmented bases.
    """
    Y_hat = augment(Y, times(F, Y.V), times(F.T, Y.U))
    Y_hat = LowRank(Y_hat.U, Y_hat.S + h * galerkin(F, Y_hat), Y_hat.V)
    return truncate(Y_hat, tau, min_rank, max_rank)


def midpoint_bug(
    Y: LowRank,
    first: Operator,
    second: Operator,
    h: float = 1.0,
    tau: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> LowRank:
    """The BUG integrator of second order, by the midpoint rule. Ceruti, Einkemmer, Kusch & Lubich 2024.

    first, second and h are those of `strang`. Bases of the midpoint are augmented by F applied to them, so
    the rank may grow fourfold; what is then truncated enters to first order, times its size.
    """
    half = augment(Y, times(first, Y.V), times(first.T, Y.U))
    FV = times(first, half.V) + times(second, half.V)
    Y_hat = augment(half, FV, times(first.T, half.U) + times(second.T, half.U))
    S = Y_hat.S + h * (galerkin(first, Y_hat) + galerkin(second, Y_hat))
    return truncate(LowRank(Y_hat.U, S, Y_hat.V), tau, min_rank, max_rank)


def bug(Y: LowRank, F: Operator, h: float = 1.0) -> LowRank:
    """The basis-update & Galerkin (unconventional) integrator at fixed rank. Ceruti & Lubich 2022.

    Unlike in projector splitting no step goes back in time, and K- and L-step are independent of each other.
    """
    Y1 = update_bases(Y, times(F, Y.V), times(F.T, Y.U), h)
    return LowRank(Y1.U, Y1.S + h * galerkin(F, Y1), Y1.V)


def projector_splitting(Y: LowRank, F: Operator, h: float = 1.0, adjoint: bool = False) -> LowRank:
    """The projector-splitting integrator KSL, or LSK with adjoint=True. Lubich & Oseledets 2014.

    First order; a step followed by an adjoint step is the Strang splitting, of second order (`strang`).
    """
    if adjoint:
        return projector_splitting(Y.T, F.T, h).T
    FV = times(F, Y.V)
    U1, S_hat = qr(Y.U @ Y.S + h * FV)
    S_tilde = S_hat - h * (U1.mT @ FV)  # the S-step goes back in time
    V1, S1t = qr(Y.V @ S_tilde.mT + h * times(F.T, U1))
    return LowRank(U1, S1t.mT, V1)


def strang(Y: LowRank, first: Operator, second: Operator, h: float = 1.0) -> LowRank:
    """Projector splitting of second order: KSL over half a step, LSK over the other half.

    first and second are F on the two halves and h is the length of either; for data, h = 1 and F are the
    increments over the halves. It is symmetric: `strang(Y1, second, first, -h)` gives Y again.
    """
    return projector_splitting(projector_splitting(Y, first, h), second, h, adjoint=True)


@dataclass(frozen=True, eq=False)
class Residual:
    """F = A1 - Y, which anchors a step of h = 1 from Y to the data: A1 = A(t + h), known by its products.

    Then K1 = A1 V, L1 = A1ᵀ U and the S-step is U1ᵀ A1 V1: the same sub-steps, taken against the data and not
    against Y + ΔA, so that no error outlives its step. With `projector_splitting` it is one step of subspace
    iteration. Increments are for where only they, or A', are at hand.
    """

    A1: Operator
    Y: LowRank

    @property
    def T(self) -> Residual:
        return Residual(self.A1.T, self.Y.T)

    def __matmul__(self, X: Tensor) -> Tensor:
        return times(self.A1, X) - self.Y @ X


def times(F: Operator, X: Tensor) -> Tensor:
    """F @ X, of a matrix F as the transpose of Xᵀ Fᵀ: MKL takes up to seventy times as long the other way.

    (2048 x 2048 or its transpose times 8 columns, Zen CPU: 2 to 6 ms against 6 to 400 ms.)
    """
    return (X.mT @ F.mT).mT if isinstance(F, Tensor) else F @ X


def galerkin(F: Operator, Y: LowRank) -> Tensor:
    """Uᵀ F V, the right-hand side of the S-equation in the bases of Y."""
    return Y.U.mT @ times(F, Y.V)


def parallel_step(
    Y: LowRank,
    FV: Tensor,
    FtU: Tensor,
    h: float,
    core: Tensor | None = None,
    direction: Direction | None = None,
) -> tuple[LowRank, Tensor]:
    """Y + h P_Y F in augmented bases, before truncation, and D = Ûᵀ P_Y F V̂; they have up to twice the rank.

    F is given by FV (m, s) and FtU (n, r), and core (r, s) stands for Uᵀ F V where a weight has terms of its
    own in there. direction(D, Ŷ) turns the small matrix D into the one along which S moves, for Ŷ = Y in
    those bases (see `velocity`); without it that is D itself. A basis to which anything is added may be an
    `AugmentedBasis`, of which `truncate` forms what it keeps.
    """
    Y_hat, D = _augment(Y, FV, FtU, core)
    S1 = Y_hat.S + h * (D if direction is None else direction(D, Y_hat))  # S-step
    return LowRank(Y_hat.U, S1, Y_hat.V), D


def augment(Y: LowRank, FV: Tensor, FtU: Tensor) -> LowRank:
    """The K- and the L-step: Y, unchanged, in bases Û = [U U1], V̂ = [V V1] that span K1 and L1, too.

    span Û = span[U, K1], since K1 = U S + h F V; likewise V̂. So Û diag(S, 0) V̂ᵀ = U S Vᵀ exactly.
    """
    Y_hat, _ = _augment(Y, FV, FtU)
    return LowRank(formed(Y_hat.U), Y_hat.S, formed(Y_hat.V))


def _augment(Y: LowRank, FV: Tensor, FtU: Tensor, core: Tensor | None = None) -> tuple[LowRank, Tensor]:
    """`augment`, whose bases are not formed, and the D of `parallel_step`."""
    U_hat, C, R = augmented(Y.U, FV)  # K-step: F V = U C + U1 R
    V_hat, _, Rt = augmented(Y.V, FtU)  # L-step
    Y_hat = LowRank(U_hat, pad(Y.S, (U_hat.shape[1], V_hat.shape[1])), V_hat)
    D = pad(C if core is None else core, Y_hat.S.shape)
    r, s = Y.S.shape
    D[:r, s:], D[r:, :s] = Rt.mT, R
    return Y_hat, D


def update_bases(Y: LowRank, FV: Tensor, FtU: Tensor, h: float) -> LowRank:
    """The K- and the L-step at fixed rank: Y projected onto bases of K1 = U S + h F V, L1 = V Sᵀ + h Fᵀ U."""
    return project(Y, qr(Y.U @ Y.S + h * FV)[0], qr(Y.V @ Y.S.mT + h * FtU)[0])


def project(Y: LowRank, U1: Tensor, V1: Tensor) -> LowRank:
    """Y in other bases: U1 U1ᵀ Y V1 V1ᵀ."""
    return LowRank(U1, (U1.mT @ Y.U) @ Y.S @ (Y.V.mT @ V1), V1)


def pad(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """diag(S, 0), of that shape."""
    return torch.nn.functional.pad(S, (0, shape[1] - S.shape[1], 0, shape[0] - S.shape[0]))
