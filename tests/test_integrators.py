"""What the theory promises of one step, and of many: exactness, robustness, order."""

from functools import cache

import numpy as np
import pytest
import torch

from dlrt import LowRank, integrators, truncate
from dlrt.integrators import Residual, augmented_bug, bug, midpoint_bug, parallel_bug, projector_splitting

pytestmark = pytest.mark.usefixtures("float64")


def ksl(Y, increments, rank):
    return projector_splitting(Y, sum(increments))


def strang(Y, increments, rank):
    return integrators.strang(Y, *increments)


STEPS = {  # each from Y, the increments of the two halves of a step, and the rank to keep
    "bug": lambda Y, increments, rank: bug(Y, sum(increments)),
    "augmented": lambda Y, increments, rank: augmented_bug(Y, sum(increments), max_rank=rank),
    "midpoint": lambda Y, increments, rank: midpoint_bug(Y, *increments, max_rank=rank),
    "ksl": ksl,
    "strang": strang,
}


def follow(A, step, rank, steps, start=None):
    """Integrate the increments of A over [0, 1] from its best approximation at 0."""
    Y = LowRank.from_dense(A(0.0), rank=rank) if start is None else start
    for n in range(steps):
        t0, t1, t2 = n / steps, (n + 0.5) / steps, (n + 1) / steps
        Y = step(Y, (A(t1) - A(t0), A(t2) - A(t1)), rank)
    return Y


@cache
def exponential(seed):
    """A(t) = exp(t W1) exp(t) D exp(t W2)ᵀ with D = diag(2⁻¹ ... 2⁻¹⁰⁰) and skew-symmetric W."""
    rng = np.random.default_rng(seed)
    W1, W2 = ((R - R.T) / 2 for R in (torch.from_numpy(rng.random((100, 100))) for _ in range(2)))
    D = (2.0 ** -torch.arange(1, 101)).diag()

    @cache
    def A(t):
        return torch.matrix_exp(t * W1) @ (np.exp(t) * D) @ torch.matrix_exp(t * W2).mT

    return A


def rotating(rank=10, size=40):
    """A(t) of exact rank, with moving bases and singular values."""
    generator = torch.Generator().manual_seed(0)
    U, V, R1, R2 = (torch.randn(size, k, generator=generator) for k in (rank, rank, size, size))
    U, V = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q

    @cache
    def A(t):
        S = (torch.arange(1, rank + 1) * (1 + 0.5 * t)).diag()
        return torch.matrix_exp(t * (R1 - R1.mT) / 4) @ U @ S @ V.mT @ torch.matrix_exp(-t * (R2 - R2.mT) / 4)

    return A


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("steps", [1, 7])
def test_a_path_of_rank_ten_is_reproduced_exactly(name, steps):
    A = rotating()
    Y = follow(A, STEPS[name], 10, steps)
    assert (Y.dense() - A(1.0)).norm() <= 1e-12 * A(1.0).norm()


def test_parallel_bug_is_the_truncated_projected_euler_step():
    Y = LowRank.from_dense(torch.randn(12, 9), rank=3)
    F, h = torch.randn(12, 9), 0.3
    PU, PV = Y.U @ Y.U.mT, Y.V @ Y.V.mT
    projected = PU @ F + F @ PV - PU @ F @ PV
    for rank in (3, 4, 6):
        expected = LowRank.from_dense(Y.dense() + h * projected, rank=rank)
        assert torch.allclose(parallel_bug(Y, F, h, max_rank=rank).dense(), expected.dense(), atol=1e-13)


def test_augmented_bug_without_truncation_holds_the_euler_step_in_its_bases():
    """Its Galerkin step is Ûᵀ (Y + h F) V̂: the result is Y + h F projected onto the larger bases."""
    Y, F, h = LowRank.from_dense(torch.randn(12, 9), rank=2), torch.randn(12, 9), 0.1
    Y1 = augmented_bug(Y, F, h)
    assert Y1.rank == 4
    euler = Y.dense() + h * F
    projected = Y1.U @ Y1.U.mT @ euler @ Y1.V @ Y1.V.mT
    assert torch.allclose(Y1.dense(), projected, atol=1e-13)
    assert torch.allclose(Y1.dense() @ Y.V, euler @ Y.V, atol=1e-13)  # K(h) lies in its range, whole
    assert torch.allclose(Y1.dense().mT @ Y.U, euler.mT @ Y.U, atol=1e-13)


def test_at_full_rank_every_bug_step_is_the_euler_step():
    A, F = torch.randn(8, 5), torch.randn(8, 5)
    for integrator in (bug, augmented_bug, parallel_bug):
        assert torch.allclose(integrator(LowRank.from_dense(A), F, 0.2).dense(), A + 0.2 * F, atol=1e-12)


@pytest.mark.parametrize("name", ["bug", "augmented"])
def test_the_bug_family_keeps_symmetry(name):
    W = torch.randn(20, 20)
    B = (2.0 ** -torch.arange(20)).diag()

    def A(t):
        E = torch.matrix_exp(t * (W - W.mT) / 20)
        return E @ B @ E.mT

    Y = follow(A, STEPS[name], 5, 10).dense()
    assert (Y - Y.mT).norm() < 1e-12
    assert (Y - A(1.0)).norm() < 0.2  # and it has followed


def turning(smallest):
    """A(t) with the singular values 1, 0.1, smallest, and two below that, whose bases turn."""
    sigma = torch.tensor([1.0, 0.1, smallest, 0.1 * smallest, 0.01 * smallest])
    generator = torch.Generator().manual_seed(1)
    R1, R2 = (torch.randn(15, 15, generator=generator) for _ in range(2))

    def A(t):
        E1, E2 = torch.matrix_exp(t * (R1 - R1.mT) / 4), torch.matrix_exp(t * (R2 - R2.mT) / 4)
        return E1[:, :5] * sigma @ E2[:, :5].mT

    return A, sigma


@pytest.mark.parametrize("name", STEPS)
def test_the_error_does_not_feel_a_tiny_singular_value(name):
    """Where the smallest one retained goes to 1e-12 the error stays of the order of what is truncated."""
    errors = []
    for smallest in (1e-2, 1e-6, 1e-12):
        A, sigma = turning(smallest)
        errors.append((follow(A, STEPS[name], 3, 20).dense() - A(1.0)).norm().item())
        assert errors[-1] <= 3 * sigma[3:].norm() + 1e-13
    assert errors[0] > errors[1] > errors[2]


def test_the_error_of_the_parallel_step_falls_with_its_size_whatever_the_smallest_singular_value():
    """It leaves out a part of the increment, so that its error is of its size: of first order at least."""
    counts, errors = (20, 40, 80, 160), {}
    for smallest in (1e-6, 1e-12):
        A, _ = turning(smallest)
        paths = [follow(A, lambda Y, F, rank: parallel_bug(Y, sum(F), max_rank=rank), 3, n) for n in counts]
        errors[smallest] = [(Y.dense() - A(1.0)).norm().item() for Y in paths]
        assert -np.polyfit(np.log(counts), np.log(errors[smallest]), 1)[0] >= 1
    assert errors[1e-12] == pytest.approx(errors[1e-6], rel=0.1)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("rank", "bound"), [(4, 1.12), (8, 1.17), (16, 1.26), (32, 1.45)])
def test_error_on_the_exponential_stays_near_the_best(name, rank, bound):
    for seed in range(4):
        A = exponential(seed)
        best = torch.linalg.svdvals(A(1.0))[rank:].norm()
        assert (follow(A, STEPS[name], rank, 100).dense() - A(1.0)).norm() <= bound * best


def test_slopes_against_the_flow_are_one_and_for_strang_two():
    """One for midpoint BUG as well: what it truncates from rank 4 r to r is no smaller with smaller steps."""
    A = exponential(0)
    reference = follow(A, strang, 8, 640).dense()
    counts = (20, 40, 80, 160)
    for name, step in STEPS.items():
        errors = [(follow(A, step, 8, n).dense() - reference).norm().item() for n in counts]
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert abs(slope - (2 if name == "strang" else 1)) <= 0.08, (name, slope)


def test_the_adjoint_undoes_a_step_backwards():
    Y, F = LowRank.from_dense(torch.randn(9, 7), rank=3), torch.randn(9, 7)
    there = projector_splitting(Y, F, 0.3)
    back = projector_splitting(there, F, -0.3, adjoint=True)
    assert torch.allclose(back.dense(), Y.dense(), atol=1e-12)


def test_strang_returns_where_the_data_return():
    """It is symmetric: the way back undoes the way there, whatever was truncated at the start."""
    A = exponential(0)
    path = [A(n / 20) for n in range(21)]
    path += path[-2::-1]
    for step, bound in ((strang, 1e-12), (STEPS["bug"], None)):
        Y = start = LowRank.from_dense(path[0], rank=8)
        for A0, A1, A2 in zip(path[:-2:2], path[1:-1:2], path[2::2], strict=True):
            Y = step(Y, (A1 - A0, A2 - A1), 8)
        gap = (Y.dense() - start.dense()).norm()
        assert gap <= bound if bound else gap > 1e-6


def test_an_anchored_step_is_taken_against_the_data():
    """K1 = A1 V, L1 = A1ᵀ U, S1 = U1ᵀ A1 V1, as if nothing had gone before but the bases."""
    Y, A1 = LowRank.from_dense(torch.randn(12, 9), rank=3), torch.randn(12, 9)
    U1, V1 = torch.linalg.qr(A1 @ Y.V).Q, torch.linalg.qr(A1.mT @ Y.U).Q
    expected = U1 @ U1.mT @ A1 @ V1 @ V1.mT
    assert torch.allclose(bug(Y, Residual(A1, Y)).dense(), expected, atol=1e-13)
    U2, V2 = torch.linalg.qr(torch.cat([Y.U, U1], 1)).Q, torch.linalg.qr(torch.cat([Y.V, V1], 1)).Q
    expected = U2 @ U2.mT @ A1 @ V2 @ V2.mT
    assert torch.allclose(augmented_bug(Y, Residual(A1, Y)).dense(), expected, atol=1e-13)


def test_anchored_projector_splitting_is_a_step_of_subspace_iteration():
    Y, A1 = LowRank.from_dense(torch.randn(12, 9), rank=3), torch.randn(12, 9)
    U1 = torch.linalg.qr(A1 @ Y.V).Q
    assert torch.allclose(projector_splitting(Y, Residual(A1, Y)).dense(), U1 @ U1.mT @ A1, atol=1e-13)


def test_anchored_steps_forget_a_poor_start():
    A = exponential(0)
    steps = {  # each from Y, A(t) and A(t + h)
        "increments": lambda Y, A0, A1: bug(Y, A1 - A0),
        "anchored": lambda Y, A0, A1: bug(Y, Residual(A1, Y)),
    }
    best = torch.linalg.svdvals(A(1.0))[8:].norm()
    errors = {}
    for name, step in steps.items():
        Y = LowRank.from_dense(A(0.0) + 0.01 * torch.randn(100, 100), rank=8)
        for n in range(100):
            Y = step(Y, A(n / 100), A((n + 1) / 100))
        errors[name] = (Y.dense() - A(1.0)).norm() / best
    assert errors["anchored"] < 1.05
    assert errors["increments"] > 5


def test_an_operator_serves_as_well_as_a_matrix():
    Y, F = LowRank.from_dense(torch.randn(9, 7), rank=3), LowRank.from_dense(torch.randn(9, 7))
    for name in ("bug", "augmented_bug", "parallel_bug", "projector_splitting"):
        integrator = getattr(integrators, name)
        assert torch.allclose(
            integrator(Y, F, 0.1).dense(), integrator(Y, F.dense(), 0.1).dense(), atol=1e-12
        )
    halves = midpoint_bug(Y, F, F, 0.1), midpoint_bug(Y, F.dense(), F.dense(), 0.1)
    assert torch.allclose(halves[0].dense(), halves[1].dense(), atol=1e-12)


def test_augmented_bug_finds_the_rank_that_the_tolerance_asks_for():
    A = rotating(rank=4)
    Y = LowRank.from_dense(A(0.0), rank=4)
    for n in range(10):
        Y = augmented_bug(Y, A((n + 1) / 10) - A(n / 10), tau=1e-9)
    assert Y.rank == 4
    assert truncate(Y, 1e-9).rank == 4


@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("seed", range(3))
def test_an_adaptive_run_keeps_its_tolerance_with_nearly_the_optimal_rank(tol, seed):
    """Each of n steps may truncate tol / n, and the start tol."""
    A, n = exponential(seed), 100
    Y = LowRank.from_dense(A(0.0), tau=tol)
    for k in range(n):
        Y = augmented_bug(Y, A((k + 1) / n) - A(k / n), tau=tol / n)
    assert (Y.dense() - A(1.0)).norm() <= 3 * tol * A(1.0).norm()
    assert Y.rank <= LowRank.from_dense(A(1.0), tau=tol).rank + 4


def test_increments_cannot_bring_back_what_the_start_lacks():
    A, n = exponential(0), 50
    Y = LowRank.from_dense(A(0.0), rank=2)
    missing = (Y.dense() - A(0.0)).norm()
    for k in range(n):
        Y = augmented_bug(Y, A((k + 1) / n) - A(k / n), tau=1e-6 / n)
    assert Y.rank > 10
    assert (Y.dense() - A(1.0)).norm() > missing / 2
