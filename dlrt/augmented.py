"""An orthonormal basis and more directions beside it, in as few products of thin matrices as it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dlrt.checks import check_precision
from dlrt.lowrank import qr


@dataclass(frozen=True, eq=False)
class AugmentedBasis:
    """[U N, (A - U N C) R⁻¹] (m, k + r), orthonormal, and not formed: its products are made of U and A.

    A product costs what it would with the new columns at hand, so that these are saved.
    """

    U: Tensor
    N: Tensor
    A: Tensor
    C: Tensor
    inverse: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.U.shape[1] + self.A.shape[1]

    def __matmul__(self, X: Tensor) -> Tensor:
        k = self.U.shape[1]
        new = self.inverse @ X[k:]
        return (self.U @ (self.N @ (X[:k] - self.C @ new))).addmm_(self.A, new)

    def added_times(self, X: Tensor) -> Tensor:
        """The product (r, l) of the transposed new columns with X (m, l)."""
        return self.inverse.mT @ (self.A.mT @ X - self.C.mT @ (self.N @ (self.U.mT @ X)))

    def formed(self) -> Tensor:
        U = self.U @ self.N
        return torch.cat([U, (self.A - U @ self.C) @ self.inverse], dim=1)


def formed(basis: Tensor | AugmentedBasis) -> Tensor:
    """A basis with all its columns."""
    return basis if isinstance(basis, Tensor) else basis.formed()


def augmented(U: Tensor, A: Tensor) -> tuple[Tensor | AugmentedBasis, Tensor, Tensor]:
    """The basis [U U1], C (k, r), R (p, r) with A = U C + U1 R, for a basis U (m, k) and A (m, r).

    p = min(r, m - k). Rounding, which would add up over thousands of steps, is taken back first: U becomes
    U N, N = (3 I - Uᵀ U) / 2. Then Rᵀ R = Aᵀ A - Cᵀ C: thin matrix products and a Cholesky factor. Where
    that is not accurate it is done again, of (A - U C) R⁻¹ (Yamamoto et al. 2015). Where A adds fewer than p
    directions, or some hardly, Householder's QR comes first, and adds arbitrary directions. ValueError for
    half precision.
    """
    check_precision("matrices", A)
    m, r = A.shape
    N = _to_orthonormal(U)
    outside = m - U.shape[1]
    if r <= outside:
        long = 5 * r < 2 * m and m * r > 4096
        errors = 3e3 if long else 1e2  # where LAPACK's QR is as fast there is less reason to accept them
        basis, R, accurate = _by_gram_matrix(U, N, A, errors)
        if accurate:
            return basis, basis.C, R
        if long:
            for C, B, R0 in _orthogonalised(basis, R):
                again, R1, accurate = _by_gram_matrix(U, N, B, errors)
                if accurate:
                    return again, C + again.C @ R0, R1 @ R0
    U = U @ N
    # as many directions as there are outside U complete it, whatever A is
    scale = A.abs().amax(0).clamp(min=torch.finfo(A.dtype).tiny)
    U1 = qr(torch.cat([U, (A / scale)[:, :outside]], dim=1))[0][:, U.shape[1] :]
    return torch.cat([U, U1], dim=1), U.mT @ A, U1.mT @ A


def _to_orthonormal(U: Tensor) -> Tensor:
    """N with U N orthonormal, for U that is almost: a Newton-Schulz step, which squares the error away."""
    N = (U.mT @ U).mul_(-0.5)
    N.diagonal().add_(1.5)
    return N


def _by_gram_matrix(U: Tensor, N: Tensor, A: Tensor, errors: float) -> tuple[AugmentedBasis, Tensor, bool]:
    """[U N, U1], and R with A = U N C + U1 R; and whether U1 is orthonormal to 8 √r times so many errors.

    Rounding errors, that is; mostly it is ten to a hundred times better. With columns of A - U N C scaled to
    length 1, U1ᵀ U1 - I is at most about 8 c ‖R⁻¹‖² of them, and Nᵀ Uᵀ U1 less, where c is the largest ratio
    of squared lengths, of a column of A and of A - U N C: what subtraction cancels. (Frobenius norms;
    measured over random matrices, r from 3 to 320.)
    """
    C = N @ (U.mT @ A)
    gram = A.mT @ A
    schur = gram.addmm(C.mT, C, alpha=-1)  # the Gram matrix of A - U N C
    R, info = torch.linalg.cholesky_ex(schur, upper=True)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, eye, upper=True)
    squares = schur.diagonal()
    growth = squares @ inverse.square().sum(1) * (gram.diagonal() / squares).amax()
    # one read, for which the host waits
    grown, least, failed = torch.stack([growth, squares.amin(), info.to(R.dtype)]).tolist()
    finfo = torch.finfo(R.dtype)
    exact = not failed and least > finfo.tiny / finfo.eps  # smaller squares have lost digits
    if failed:
        R = torch.full_like(R, torch.nan)  # instead of what is left of the Gram matrix
    return AugmentedBasis(U, N, A, C, inverse), R, exact and grown < errors * len(R) ** 0.5


def _orthogonalised(basis: AugmentedBasis, R: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """C, B, R with A = U N C + B R and B nearly orthonormal: by an R that is not accurate, then by noisy QR.

    The latter, which is slow, is made only if it is asked for.
    """
    U, A, C = basis.U @ basis.N, basis.A, basis.C
    yield C, torch.linalg.solve_triangular(R, A - U @ C, upper=True, left=False), R
    scale = A.abs().amax(0).clamp(min=torch.finfo(A.dtype).tiny)
    A = A / scale
    C = U.mT @ A
    B, R = noisy_qr(A - U @ C)
    yield C * scale, B, R * scale


def noisy_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Householder's QR of A (columns of order 1) with rounding errors added: what A lacks becomes random."""
    generator = torch.Generator(A.device).manual_seed(0)  # the same in all processes
    noise = torch.randn(A.shape, dtype=A.dtype, device=A.device, generator=generator)
    return qr(A.add(noise, alpha=4 * torch.finfo(A.dtype).eps))
