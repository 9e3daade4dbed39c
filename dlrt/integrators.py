"""One step of a low-rank integrator for Y' = F on the manifold of rank-r matrices, Y = U S Vᵀ.

F (m, n) is used only through the products F @ V and F.T @ U, so it may be a matrix (for data, h = 1 and the
increment A(t + h) - A(t)) or an operator (for a layer, the negative gradient, see `gradient.Gradient`). Every
function takes Y at t and gives Y1 at t + h; Koch & Lubich 2007 is the flow that all of them approximate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlrt.lowrank import LowRank, complement, rotate, truncated_svd


class Operator(Protocol):
    """What an integrator needs of F (m, n): F @ V for V (n, k) and F.T @ U for U (m, k)."""

    @property
    def T(self) -> Operator: ...

    def __matmul__(self, X: Tensor) -> Tensor: ...


def bug(Y: LowRank, F: Operator, h: float = 1.0) -> LowRank:
    """The basis-update & Galerkin (unconventional) integrator at fixed rank. Ceruti & Lubich 2022.

    Unlike in projector splitting no step goes back in time, and K- and L-step are independent of each other.
    """
    Y1 = move_bases(Y, F @ Y.V, F.T @ Y.U, h)
    return LowRank(Y1.U, Y1.S + h * galerkin(F, Y1), Y1.V)


def augmented_bug(
    Y: LowRank,
    F: Operator,
    h: float = 1.0,
    tau: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> LowRank:
    """The rank-adaptive BUG integrator. Ceruti, Kusch & Lubich 2022.

    The rank may double before truncation to the relative tolerance tau; tau = None truncates to max_rank
    only.
    """
    U1, V1, D = augment(Y, F)
    S_hat = pad_like(Y.S, D) + h * D
    return recompress((Y.U, U1), S_hat, (Y.V, V1), tau, min_rank, max_rank)[0]


def parallel_bug(
    Y: LowRank,
    F: Operator,
    h: float = 1.0,
    tau: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> LowRank:
    """The parallel integrator: K-, L- and S-step at once, all at Y. Ceruti, Kusch & Lubich 2024.

    It is the truncated projected Euler step T(Y + h P_Y F), P_Y F = U Uᵀ F + F V Vᵀ - U Uᵀ F V Vᵀ.
    """
    U1, V1, D = augment(Y, F, new_block=False)
    S_hat = pad_like(Y.S, D) + h * D
    return recompress((Y.U, U1), S_hat, (Y.V, V1), tau, min_rank, max_rank)[0]


def projector_splitting(Y: LowRank, F: Operator, h: float = 1.0, adjoint: bool = False) -> LowRank:
    """The projector-splitting integrator KSL, or LSK with adjoint=True. Lubich & Oseledets 2014.

    First order; a step followed by an adjoint step is the Strang splitting, of second order (`strang`).
    """
    if adjoint:
        return projector_splitting(Y.T, F.T, h).T
    FV = F @ Y.V
    U1, S_hat = torch.linalg.qr(Y.U @ Y.S + h * FV)
    S_tilde = S_hat - h * (U1.mT @ FV)  # the S-step goes back in time
    V1, S1t = torch.linalg.qr(Y.V @ S_tilde.mT + h * (F.T @ U1))
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
        return self.A1 @ X - self.Y @ X


def galerkin(F: Operator, Y: LowRank) -> Tensor:
    """Uᵀ F V, the right-hand side of the S-equation in the bases of Y."""
    return Y.U.mT @ (F @ Y.V)


def move_bases(Y: LowRank, FV: Tensor, FtU: Tensor, h: float) -> LowRank:
    """The K- and the L-step: Y projected onto bases of K1 = U S + h F V and L1 = V Sᵀ + h Fᵀ U."""
    U1 = torch.linalg.qr(Y.U @ Y.S + h * FV).Q
    V1 = torch.linalg.qr(Y.V @ Y.S.mT + h * FtU).Q
    return LowRank(U1, (U1.mT @ Y.U) @ Y.S @ (Y.V.mT @ V1), V1)


def augment(
    Y: LowRank, F: Operator, new_block: bool = True, old_block: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The K- and the L-step: U1, V1 such that Û = [U U1], V̂ = [V V1] span K1 and L1; and D = Ûᵀ F V̂.

    span Û = span[U, K1], since K1 = U S + h F V; likewise V̂. Û diag(S, 0) V̂ᵀ = U S Vᵀ exactly, so F at Y
    serves the S-step too. The blocks of D that meet U or V come from the products already made, where Uᵀ F V
    is not known already (old_block); only the new one, U1ᵀ F V1, asks for a third, and the parallel
    integrator sets it to zero (new_block=False).
    """
    FV, FtU = F @ Y.V, F.T @ Y.U
    U1, V1 = complement(Y.U, _spanning(F, FV)), complement(Y.V, _spanning(F.T, FtU))
    old = Y.U.mT @ FV if old_block is None else old_block
    grows = U1.shape[1] > 0 and V1.shape[1] > 0  # a basis that is complete already has nothing to add
    new = U1.mT @ (F @ V1) if new_block and grows else Y.S.new_zeros(U1.shape[1], V1.shape[1])
    D = torch.cat([torch.cat([old, FtU.mT @ V1], dim=1), torch.cat([U1.mT @ FV, new], dim=1)])
    return U1, V1, D


def recompress(
    U_hat: tuple[Tensor, ...],
    S_hat: Tensor,
    V_hat: tuple[Tensor, ...],
    tau: float | None,
    min_rank: int,
    max_rank: int | None,
) -> tuple[LowRank, Tensor, Tensor]:
    """Û Ŝ V̂ᵀ truncated, for bases given in blocks of columns, and the P, Q of its new bases Û P, V̂ Q."""
    P, sigma, Q = truncated_svd(S_hat, tau, min_rank, max_rank)
    return LowRank(rotate(P, *U_hat), sigma.diag(), rotate(Q, *V_hat)), P, Q


def pad_like(S: Tensor, D: Tensor) -> Tensor:
    """diag(S, 0), as large as D."""
    return torch.nn.functional.pad(S, (0, D.shape[1] - S.shape[1], 0, D.shape[0] - S.shape[0]))


def _spanning(F: Operator, FV: Tensor) -> Tensor:
    """Columns that span F V, and more, if F is made of fewer samples than V has columns."""
    columns = getattr(F, "columns", None)
    return FV if columns is None or columns.shape[1] >= FV.shape[1] else columns
