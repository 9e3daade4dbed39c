"""A matrix held as U S Vᵀ, and what every integrator is made of: truncation, and a larger basis."""

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

    U: Tensor
    S: Tensor
    V: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in (self.U, self.S, self.V)]
        if any(len(shape) != 2 for shape in shapes) or (shapes[0][1], shapes[2][1]) != shapes[1]:
            raise ValueError(f"U S Vᵀ needs shapes (m, k), (k, l), (n, l), got {', '.join(map(str, shapes))}")
        check_real(self.U, self.S, self.V)

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
    return LowRank(rotate(Y.U, P), sigma.diag(), rotate(Y.V, Q))


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


def complement(U: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U1 (m, p), C (k, r), R (p, r) with A = U C + U1 R and [U U1] orthonormal, for U (m, k), A (m, r).

    p = min(r, m - k). U is orthonormal already, so only A is factorised. Where A is long and large that is
    block Gram-Schmidt against U and a Cholesky QR, all of it matrix products; both twice where once is not
    accurate (Yamamoto et al. 2015). Where A adds fewer than p directions, or some hardly, its Gram matrix is
    not definite: then Householder's QR takes the first Cholesky's place, and adds arbitrary directions.
    ValueError for half precision.
    """
    check_precision("matrices", A)
    m, r = A.shape
    outside = m - U.shape[1]
    if 5 * r < 2 * m and m * r > 4096 and r <= outside:  # elsewhere LAPACK's QR is as fast
        found = _gram_schmidt(U, A) or _gram_schmidt(U, A, noisy=True)
        if found:
            return found
    # as many directions as there are outside U complete it, whatever A is
    scale = A.abs().amax(0).clamp(min=torch.finfo(A.dtype).tiny)
    U1 = qr(torch.cat([U, (A / scale)[:, :outside]], dim=1))[0][:, U.shape[1] :]
    return U1, U.mT @ A, U1.mT @ A


def _gram_schmidt(U: Tensor, A: Tensor, noisy: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """U1, C, R of `complement`, or None where two passes are not accurate; noisy: the first by `noisy_qr`."""
    entries = A.abs()
    scale = (entries.amax(0) if noisy else entries.max()).clamp(min=torch.finfo(A.dtype).tiny)
    B = A / scale  # its squares do not overflow
    C = U.mT @ B
    B.addmm_(U, C, alpha=-1)
    if noisy:
        U1, R = noisy_qr(B)
    else:
        R, inverse = _cholesky(B)
        if _accurate(C, R, inverse):
            return B @ inverse, C * scale, R * scale
        U1 = torch.linalg.solve_triangular(R, B, upper=True, left=False)  # U1 R = B although R is inaccurate
    again = U.mT @ U1
    U1.addmm_(U, again, alpha=-1)
    R1, inverse = _cholesky(U1)
    if not _accurate(again, R1, inverse):
        return None
    return U1 @ inverse, (C + again @ R) * scale, R1 @ R * scale


def _cholesky(B: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ for B = Q R, of the Gram matrix: inexact where columns are nearly dependent, or NaN."""
    R, failed = torch.linalg.cholesky_ex(B.mT @ B, upper=True)
    R = R.where(failed == 0, torch.nan)  # else it holds what is left of the Gram matrix
    return R, torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)


def _accurate(C: Tensor, R: Tensor, inverse: Tensor) -> bool:
    """Whether U1 = B R⁻¹ is orthonormal, and orthogonal to U, to 3e-3 √r in float32; not where it is NaN.

    Mostly it is ten to a hundred times better, and `rotate` takes the error back. With columns of B scaled
    to length 1, U1ᵀ U1 - I is at most about 8 ‖R⁻¹‖² rounding errors. Uᵀ U1 is at most about 12 ‖R⁻¹‖ max
    ‖c‖ / ‖b‖ of them, for columns c of C and b of B: what projection cancels. (Frobenius norms; the factors
    were measured over random matrices, r from 3 to 320.)
    """
    finfo, length = torch.finfo(R.dtype), torch.linalg.vector_norm(R, dim=0)
    exact = length.amin() > (finfo.tiny / finfo.eps) ** 0.5  # smaller squares have lost digits
    grown = torch.linalg.matrix_norm(length.unsqueeze(1) * inverse)
    cancelled = (torch.linalg.vector_norm(C, dim=0) / length).amax()
    return bool(exact & (grown * torch.maximum(grown, cancelled) < 3e3 * len(R) ** 0.5))


def noisy_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Householder's QR of A (columns of order 1) with rounding errors added: what A lacks becomes random."""
    generator = torch.Generator(A.device).manual_seed(0)  # the same in all processes
    noise = torch.randn(A.shape, dtype=A.dtype, device=A.device, generator=generator)
    return qr(A.add(noise, alpha=4 * torch.finfo(A.dtype).eps))


def rotate(U: Tensor, P: Tensor, polish: bool = True) -> Tensor:
    """U P, orthonormal, for orthonormal U (m, k) and P (k, r).

    Rounding would add up over thousands of steps; with `polish` one Newton-Schulz step, U (3 I - Uᵀ U) / 2,
    squares the error away.
    """
    B = U @ P
    if not polish:
        return B
    gram = B.mT @ B
    return B @ torch.eye(len(gram), dtype=gram.dtype, device=gram.device).mul_(1.5).sub_(gram, alpha=0.5)
