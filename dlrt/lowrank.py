"""A matrix held as U S Vᵀ, and its truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlrt.checks import check_precision, check_rank, check_rank_bounds, check_real, check_tolerance


@dataclass(frozen=True, eq=False)
class LowRank:
    """The m x n matrix U S Vᵀ: bases U (m, k) and V (n, l) with orthonormal columns, coefficients S (k, l).

    Between steps k = l = rank. Within an augmented step k and l may differ, since a basis of an m-dimensional
    space cannot grow beyond m columns. ValueError for shapes that do not fit, TypeError for complex numbers.
    """

    U: Tensor  # from `integrators.parallel_step` to the cut it may be an AugmentedBasis, and V likewise
    S: Tensor
    V: Tensor

    def __post_init__(self) -> None:
        of_U, of_S, of_V = shapes = self.U.shape, self.S.shape, self.V.shape
        if not (len(of_U) == len(of_S) == len(of_V) == 2 and (of_U[1], of_V[1]) == of_S and min(of_S)):
            came = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"U S Vᵀ needs shapes (m, k), (k, l), (n, l) with k, l ≥ 1, got {came}")
        check_real(self.S, *(basis for basis in (self.U, self.V) if isinstance(basis, Tensor)))

    @property
    def rank(self) -> int:
        return min(self.S.shape)

    @property
    def T(self) -> LowRank:
        return LowRank(self.V, self.S.mT, self.U)

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.U @ (self.S @ (self.V.mT @ X))

    def dense(self) -> Tensor:
        return self.U @ self.S @ self.V.mT

    @classmethod
    def from_dense(cls, A: Tensor, rank: int | None = None, tau: float | None = None) -> LowRank:
        """The best approximation of A (m, n) of that rank, or within tau ‖A‖, or the smaller of both.

        Eckart-Young: the truncated singular value decomposition is the best in the Frobenius norm.
        """
        if A.dim() != 2 or not A.numel():
            raise ValueError(f"A must be a matrix with rows and columns, got the shape {tuple(A.shape)}")
        check_rank(rank, *A.shape)
        check_real(A)
        P, sigma, Q = truncated_svd(A, tau, max_rank=rank)
        U, V = (basis.clone(memory_format=torch.contiguous_format) for basis in (P, Q))  # not all of the SVD
        return cls(U, sigma.diag(), V)


def at_least_single(A: Tensor) -> Tensor:
    """A in float32 where it is half precision, of which no matrix can be decomposed."""
    return A.to(torch.promote_types(A.dtype, torch.float32))


def svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced singular value decomposition S = P diag(sigma) Qh (Qh is transposed already).

    Of half precision in float32. LAPACK's divide and conquer fails to converge on rare matrices; those are
    decomposed again in float64.
    """
    S = at_least_single(S)
    try:
        return torch.linalg.svd(S, full_matrices=False)
    except torch.linalg.LinAlgError:
        return tuple(factor.to(S.dtype) for factor in torch.linalg.svd(S.double(), full_matrices=False))


def qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced QR decomposition A = Q R. ValueError for half precision."""
    check_precision("matrices", A)
    return torch.linalg.qr(A)


def normalized(sigma: Tensor) -> Tensor:
    """Singular values, which descend, over the largest: their squares neither overflow nor vanish."""
    return sigma / sigma[0].clamp(min=torch.finfo(sigma.dtype).tiny)


def rank_within(sigma: Tensor, tau: float) -> int:
    """The smallest r with ‖sigma[r:]‖ ≤ tau ‖sigma‖, for singular values that descend."""
    tail = normalized(sigma).square().flip(0).cumsum(0).flip(0).sqrt()  # tail[j] = ‖sigma[j:]‖ / sigma[0]
    return int((tail > tau * tail[0]).sum())


def truncated_svd(
    S: Tensor, tau: float | None = None, min_rank: int = 1, max_rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of S that truncation keeps: P (k, r), sigma (r,), Q (l, r).

    r is the smallest rank with ‖sigma[r:]‖ ≤ tau ‖sigma‖ (a tail that just meets the bound is dropped), then
    raised to min_rank and cut to max_rank; tau = None keeps every value. Schotthöfer et al. 2022.
    """
    check_tolerance(tau)
    check_rank_bounds(min_rank, max_rank)
    P, sigma, Qh = svd(S)
    rank = len(sigma) if tau is None else max(min_rank, rank_within(sigma, tau))
    rank = min(rank, len(sigma), max_rank or len(sigma))
    return tuple(factor.to(S.dtype) for factor in (P[:, :rank], sigma[:rank], Qh[:rank].mT))


def truncate(Y: LowRank, tau: float | None = None, min_rank: int = 1, max_rank: int | None = None) -> LowRank:
    """Drop the smallest singular values of Y while ‖Y - Y1‖ ≤ tau ‖Y‖ (Frobenius); Y1 has a diagonal S.

    Never fewer than min_rank are kept, never more than max_rank (which may break the bound); see
    `truncated_svd`.
    """
    P, sigma, Q = truncated_svd(Y.S, tau, min_rank, max_rank)
    return LowRank(Y.U @ P, sigma.diag(), Y.V @ Q)


def leading_subspace(S: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (k, r), S1 (r, r), Q (l, r) with P S1 Qᵀ close to S (k, l), by one step of subspace iteration.

    It starts from the first columns of S, which an augmented step has changed little, and is exact where S
    has that rank: P = orth(S[:, :r]), Q S1ᵀ = Sᵀ P. Two thin QR; singular values take ten times as long.
    """
    if S.shape == (rank, rank):
        identity = torch.eye(rank, dtype=S.dtype, device=S.device)
        return identity, S, identity
    P, _ = qr(S[:, :rank])
    Q, S1t = qr(S.mT @ P)
    return P, S1t.mT, Q
