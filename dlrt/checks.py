"""What must hold of options and factors: an error is one line that says what must, and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_real(*matrices: Tensor) -> None:
    """Raise TypeError for complex numbers: transposes here are not conjugated."""
    for A in matrices:
        if A.is_complex():
            raise TypeError(f"weights must be real, got {A.dtype}: take real and imaginary parts apart")


def check_precision(name: str, A: Tensor) -> None:
    """Raise ValueError for half precision, in which no basis is orthonormal."""
    check_real(A)
    if A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {A.dtype}: call .float(), and let torch.autocast do the "
            "rest"
        )


def check_rank(rank: int | None, rows: int, columns: int) -> None:
    """Raise ValueError where no rows x columns matrix has this rank (None stands for the full rank)."""
    largest = min(rows, columns)
    if rank is not None and not (isinstance(rank, Integral) and 1 <= rank <= largest):
        raise ValueError(f"rank must lie in [1, {largest}] for a {rows} x {columns} weight, got {rank!r}")


def check_number(name: str, value: float) -> None:
    """Raise ValueError unless it is a finite number from 0 on."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number from 0 on, got {value!r}")


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless it is a whole number from `least` on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")


def check_tolerance(tau: float | None) -> None:
    """Raise ValueError unless tau is a relative tolerance (None stands for no truncation by tolerance)."""
    if tau is not None and not (isinstance(tau, Real) and 0 <= tau < 1):
        raise ValueError(
            f"tau, the share of the norm that truncation may drop, must lie in [0, 1), got {tau!r}"
        )


def check_rank_bounds(min_rank: int, max_rank: int | None) -> None:
    """Raise ValueError unless some rank satisfies both bounds (max_rank = None is no bound)."""
    check_whole("min_rank", min_rank)
    if max_rank is not None:
        check_whole("max_rank", max_rank)
    if max_rank is not None and max_rank < min_rank:
        raise ValueError(f"ranks must satisfy 1 ≤ min_rank ≤ max_rank, got {min_rank} and {max_rank}")


def check_orthonormal(name: str, *bases: Tensor) -> None:
    """Raise ValueError where a layer's bases are not orthonormal: as after averaging factors."""
    for U in bases:
        if not is_orthonormal(U):
            raise ValueError(
                f"the bases of {name} must be orthonormal, got ‖Uᵀ U - I‖ = {_off(U):.2g}: change dense "
                "weights (dlrt.to_dense, dlrt.average) and call dlrt.to_low_rank on them again"
            )


def is_orthonormal(*bases: Tensor) -> bool:
    """Whether they are that to the rounding of many steps; on the meta device all count as such."""

    def bound(U: Tensor) -> float:
        return (5e-2 if U.dtype.itemsize < 4 else 1e-2) * U.shape[1] ** 0.5

    return all(U.is_meta or _off(U) <= bound(U) for U in bases)


def _off(U: Tensor) -> float:
    """‖Uᵀ U - I‖ (Frobenius)."""
    U = U.detach().to(torch.promote_types(U.dtype, torch.float32))
    with torch.autocast(U.device.type, enabled=False):
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        return float(torch.linalg.matrix_norm(U.mT @ U - identity))


def check_factors(name: str, S: Tensor) -> None:
    """Raise ValueError where a layer's factor is a shard, a view of many parameters or half precision."""
    if not isinstance(S, torch.nn.Parameter) or hasattr(S, "placements") or S.dim() != 2:
        raise ValueError(
            f"the factors of {name} must be whole parameters, got {type(S).__name__} {tuple(S.shape)}: FSDP "
            "shards what a step needs in one piece, use DistributedDataParallel or dlrt.distributed"
        )
    check_precision(f"the factors of {name}", S)


def check_compression(compression: float | None) -> None:
    """Raise ValueError unless compression is a fraction (None stands for no budget)."""
    number = isinstance(compression, Real)
    if compression is not None and not (number and 0 < compression < 1):
        hint = f": {compression / 100:g} for {compression:g} %" if number and 1 <= compression < 100 else ""
        came = f"{compression:g}{hint}" if number else repr(compression)
        raise ValueError(f"compression must be a fraction in (0, 1), got {came}")
