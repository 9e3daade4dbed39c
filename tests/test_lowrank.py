"""The algebra of U S Vᵀ: truncation keeps its bound, an augmented basis is orthonormal and complete."""

import pytest
import torch
from torch import nn

import dlrt
from dlrt import LowRank, truncate
from dlrt.augmented import AugmentedBasis, augmented, formed


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    ).Q


def with_singular_values(*sigma):
    k = len(sigma)
    return LowRank(orthonormal(9, k), torch.tensor(sigma, dtype=torch.float64).diag(), orthonormal(7, k, 1))


def orthogonality_error(U):
    return (U.mT @ U - torch.eye(U.shape[1], dtype=U.dtype)).abs().max().item() if U.shape[1] else 0.0


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_truncation_keeps_the_fewest_singular_values_within_tau(tau):
    sigma = 0.7 ** torch.arange(6, dtype=torch.float64)
    Y = with_singular_values(*sigma)
    Y1 = truncate(Y, tau)
    norm = sigma.norm()
    assert (Y.dense() - Y1.dense()).norm() <= tau * norm + 1e-14
    assert sigma[Y1.rank - 1 :].norm() > tau * norm  # one fewer would break the bound


def test_a_tail_that_just_meets_the_tolerance_is_dropped():
    Y = with_singular_values(4.0, 3.0)  # ‖tail‖ / ‖sigma‖ = 3 / 5
    assert truncate(Y, 0.6).rank == 1
    assert truncate(Y, 0.6 - 1e-12).rank == 2


def test_truncation_can_keep_everything_and_drops_exact_zeros():
    assert truncate(with_singular_values(3.0, 2.0, 1.9), 0.1).rank == 3
    assert truncate(with_singular_values(3.0, 2.0, 0.0), 0.0).rank == 2
    assert truncate(with_singular_values(3.0, 2.0, 0.0)).rank == 3


def test_min_rank_and_max_rank_win_over_the_tolerance():
    Y = with_singular_values(8.0, 4.0, 2.0, 1.0)
    assert truncate(Y, 0.99, min_rank=3).rank == 3
    assert truncate(Y, 0.0, max_rank=2).rank == 2
    assert truncate(Y, 0.99, min_rank=99).rank == 4


def test_a_dense_matrix_comes_back_and_its_best_approximation_is_the_truncated_svd():
    A = torch.randn(8, 5, dtype=torch.float64)
    assert torch.allclose(LowRank.from_dense(A).dense(), A, atol=1e-13)
    sigma = torch.linalg.svdvals(A)
    for rank in range(1, 6):
        error = (LowRank.from_dense(A, rank=rank).dense() - A).norm()
        assert torch.isclose(error, sigma[rank:].norm(), atol=1e-13)


def test_products_and_transpose_are_those_of_the_dense_matrix():
    Y = LowRank(orthonormal(9, 3), torch.randn(3, 4, dtype=torch.float64), orthonormal(7, 4, 1))
    X = torch.randn(7, 2, dtype=torch.float64)
    assert torch.allclose(Y @ X, Y.dense() @ X)
    assert torch.equal(Y.T.dense(), (Y.V @ Y.S.mT @ Y.U.mT))


def test_impossible_arguments_are_refused_with_what_is_allowed():
    Y = with_singular_values(2.0, 1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
        truncate(Y, 1.5)
    with pytest.raises(ValueError, match="min_rank ≤ max_rank, got 3 and 2"):
        truncate(Y, 0.1, min_rank=3, max_rank=2)
    with pytest.raises(ValueError, match=r"\[1, 5\] for a 8 x 5 weight, got 6"):
        LowRank.from_dense(torch.randn(8, 5), rank=6)
    with pytest.raises(ValueError, match=r"\(m, k\), \(k, l\), \(n, l\)"):
        LowRank(Y.U, Y.S[:1], Y.V)


@pytest.mark.parametrize("factor", range(3))
def test_complex_factors_are_refused(factor):
    Y = with_singular_values(2.0, 1.0)
    factors = [Y.U, Y.S, Y.V]
    factors[factor] = factors[factor].to(torch.complex128)
    with pytest.raises(TypeError, match=r"must be real, got torch\.complex128"):
        LowRank(*factors)
    with pytest.raises(TypeError, match=r"must be real, got torch\.complex128"):
        LowRank.from_dense(factors[factor])


@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize("options", [{}, {"tau": 0.1}, {"compression": 0.3}, {"spatial": True}], ids=str)
def test_a_complex_network_is_refused_and_stays_as_it_was(options):
    for last in (nn.Linear(8, 4, dtype=torch.complex64), nn.Conv2d(8, 4, 3, dtype=torch.complex64)):
        model = nn.Sequential(nn.Linear(4, 8), last)
        with pytest.raises(TypeError, match=r"must be real, got torch\.complex64"):
            dlrt.to_low_rank(model, **options)
        assert type(model[0]) is nn.Linear


DIRECTIONS = {
    "anything": lambda m, U: torch.randn(m, 6),
    "graded columns": lambda m, U: torch.randn(m, 6) * 10.0 ** -torch.arange(6),
    "hardly outside U": lambda m, U: U @ torch.randn(4, 6) + 1e-5 * torch.randn(m, 6),
    "alike": lambda m, U: 1 + 0.05 * torch.randn(m, 6),
    "deficient": lambda m, U: torch.randn(m, 2) @ torch.randn(2, 6),
    "nearly deficient": lambda m, U: torch.randn(m, 2) @ torch.randn(2, 6) + 1e-6 * torch.randn(m, 6),
    "zero": lambda m, U: torch.zeros(m, 6),
    "one column twice": lambda m, U: torch.randn(m, 5)[:, [0, 1, 2, 3, 4, 0]],
    "one column tiny": lambda m, U: torch.randn(m, 6) * torch.tensor([1, 1, 1, 1, 1e-20, 1]),
    "tiny": lambda m, U: 1e-25 * torch.randn(m, 6),
    "huge": lambda m, U: 1e25 * torch.randn(m, 6),
}


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [30, 900, 5120])
def test_an_augmented_basis_is_orthonormal_and_spans_what_the_basis_lacked(m, dtype, name):
    U = orthonormal(m, 4)
    A = DIRECTIONS[name](m, U.float()).to(dtype)
    U = U.to(dtype)
    basis, C, R = augmented(U, A)
    U_hat = formed(basis)
    U1 = U_hat[:, 4:]
    eps = torch.finfo(dtype).eps
    assert basis.shape == U_hat.shape == (m, 10)
    error = orthogonality_error(U_hat)
    one_pass = name in ("alike", "hardly outside U")  # accepted although columns are nearly dependent
    assert error < (60_000 if one_pass else 200) * eps
    again, _, _ = augmented(U_hat, torch.ones(m, 1, dtype=dtype))
    assert orthogonality_error(formed(again)[:, :10]) < 50 * eps + error**2  # which takes the error back
    largest = A.abs().max().clamp(min=1e-30)  # float32's norm of huge entries overflows
    assert (A / largest - U @ (C / largest) - U1 @ (R / largest)).norm() <= 50 * eps * m**0.5


@pytest.mark.parametrize(("rank", "expected"), [(5, 1), (4, 2), (3, 3), (6, 0)])
def test_an_augmented_basis_never_outgrows_the_space(rank, expected):
    U = orthonormal(6, rank)
    basis, C, R = augmented(U, torch.randn(6, rank, dtype=torch.float64))
    assert (basis.shape, C.shape, R.shape) == ((6, rank + expected), (rank, rank), (expected, rank))
    assert orthogonality_error(formed(basis)) < 1e-13


@pytest.mark.parametrize("name", ["anything", "alike", "deficient"])
def test_products_with_an_augmented_basis_are_those_with_its_columns(name):
    U = orthonormal(900, 4)
    basis, _, _ = augmented(U, DIRECTIONS[name](900, U).double())
    assert isinstance(basis, AugmentedBasis)
    X, Y = torch.randn(10, 3, dtype=torch.float64), torch.randn(900, 3, dtype=torch.float64)
    torch.testing.assert_close(basis @ X, formed(basis) @ X)
    torch.testing.assert_close(basis.added_times(Y), formed(basis)[:, 4:].mT @ Y)


@pytest.mark.parametrize("m", [30, 900])
@pytest.mark.parametrize("outside", [0.1, 0.03])
def test_an_error_of_a_basis_does_not_grow_where_much_lies_inside_it(outside, m):
    """1e-4 before, squared afterwards; unmended it would be 0.01 and 0.1."""
    U = orthonormal(m, 5).float()
    U = U @ (torch.eye(5) + 1e-4 * torch.randn(5, 5))
    A = U @ torch.linalg.qr(torch.randn(5, 5))[0] + outside * orthonormal(m, 5, 1).float()
    basis, C, R = augmented(U, A)
    assert orthogonality_error(formed(basis)) < 2e-3  # of rounding alone, times the square of that share
    assert (formed(basis) @ torch.cat([C, R]) - A).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [5, 20])
@pytest.mark.parametrize("outside", [0.5, 0.2, 0.05])
def test_bases_stay_orthonormal_while_gradients_lie_mostly_inside_them(rank, outside):
    W = LowRank(
        orthonormal(700, rank), torch.logspace(0, -2, rank).double().diag(), orthonormal(600, rank, 1)
    )
    layer = dlrt.LowRankLinear.from_dense(torch.nn.Linear(600, 700), rank=rank)
    layer.factors = LowRank(*(factor.float() for factor in (W.U, W.S, W.V)))
    optimizer = dlrt.DLRT(
        layer, torch.optim.SGD, lr=1.0, update="muon", tau=0.0, max_rank=rank, allot_every=1000
    )
    for _ in range(21):
        optimizer.zero_grad()
        beside = orthonormal(700, rank, 2).float(), orthonormal(600, rank, 3).float()
        G = layer.U.detach() @ layer.V.detach().mT + outside * beside[0] @ beside[1].mT
        (layer.weight * G).sum().backward()
        optimizer.step()
        assert max(orthogonality_error(basis.detach()) for basis in (layer.U, layer.V)) < 1e-4


def test_bases_stay_orthonormal_over_thousands_of_rotations_in_float32():
    U = orthonormal(40, 5).float()
    for step in range(3000):
        P = torch.linalg.svd(torch.randn(10, 10, generator=torch.Generator().manual_seed(step)))[0][:, :5]
        U = augmented(U, torch.randn(40, 5))[0] @ P
    assert orthogonality_error(U) < 2e-6
