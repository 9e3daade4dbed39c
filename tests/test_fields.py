"""The integrators for a field: a constant one, one of exact rank, and that of Schrödinger's equation."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from dlrt import LowRank, fields, integrators

pytestmark = pytest.mark.usefixtures("float64")

N = 100
STEPS = {  # each from Y, the field, t, h, and the rank to keep
    "bug": lambda Y, F, t, h, rank: fields.bug(Y, F, t, h),
    "augmented": lambda Y, F, t, h, rank: fields.augmented_bug(Y, F, t, h, max_rank=rank),
    "midpoint": lambda Y, F, t, h, rank: fields.midpoint_bug(Y, F, t, h, max_rank=rank),
    "ksl": lambda Y, F, t, h, rank: fields.projector_splitting(Y, F, t, h),
    "strang": lambda Y, F, t, h, rank: fields.strang(Y, F, t, h),
}


def follow(F, Y, step, rank, steps):
    for n in range(steps):
        Y = step(Y, F, n / steps, 1 / steps, rank)
    return Y


def as_real(X, z=1):
    """z X as a real matrix of twice the size, each number a + ib a block [[a, -b], [b, a]].

    Sums and products stay what they are, so the integrators do with it what they would do with z X; singular
    values come in pairs, so complex rank r is real rank 2r, and norms grow by sqrt(2).
    """
    z = complex(z)
    return torch.kron(X.contiguous(), torch.tensor([[z.real, -z.imag], [z.imag, z.real]]))


def schroedinger_matrices():
    """D, V and -i of i X' = D X + X D + V X V on N points."""
    D = torch.eye(N) - torch.ones(N - 1).diag(1) / 2 - torch.ones(N - 1).diag(-1) / 2
    V = (1 - torch.cos(2 * math.pi * torch.arange(-N // 2, N // 2) / N)).diag()
    return as_real(D), as_real(V), as_real(torch.eye(N), -1j)


def schroedinger_field():
    D, V, minus_i = schroedinger_matrices()

    def F(t, Y):
        terms = ((D @ Y.U, Y.V), (Y.U, D @ Y.V), (V @ Y.U, V @ Y.V))
        U1, V1 = (torch.cat(bases, dim=1) for bases in zip(*terms, strict=True))
        return LowRank(minus_i @ U1, torch.block_diag(Y.S, Y.S, Y.S), V1)

    return F


@cache
def schroedinger(seed):
    """The field, the start at a given rank, and X at t = 1."""
    rng = np.random.default_rng(seed)
    U0, V0 = (torch.linalg.qr(torch.from_numpy(rng.random((N, N)))).Q for _ in range(2))
    sigma = 10.0 ** -torch.arange(1, N + 1)
    sigma = sigma / sigma.norm()
    D, V, minus_i = schroedinger_matrices()

    def start(rank):
        return LowRank(as_real(U0[:, :rank]), as_real(sigma[:rank].diag()), as_real(V0[:, :rank]))

    X = start(N).dense()
    for n in range(400):
        X = fields.rk4(lambda t, X: minus_i @ (D @ X + X @ D + V @ X @ V), X, n / 400, 1 / 400)
    return schroedinger_field(), start, X


def schroedinger_error(seed, name, steps, rank=12):
    """The error at t = 1, in units of the best of that rank."""
    F, start, X = schroedinger(seed)
    best = torch.linalg.svdvals(X)[2 * rank :].norm()
    return ((follow(F, start(rank), STEPS[name], 2 * rank, steps).dense() - X).norm() / best).item()


@pytest.mark.parametrize("name", ["bug", "augmented_bug", "projector_splitting"])
def test_for_a_constant_field_the_step_is_that_of_the_integrators(name):
    Y, G = LowRank.from_dense(torch.randn(12, 9), rank=3), torch.randn(12, 9)
    expected = getattr(integrators, name)(Y, G, 0.3).dense()
    assert torch.allclose(getattr(fields, name)(Y, lambda t, Y: G, 1.0, 0.3).dense(), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["strang", "midpoint_bug"])
def test_for_a_constant_field_two_halves_are_those_of_the_integrators(name):
    Y, G = LowRank.from_dense(torch.randn(12, 9), rank=3), torch.randn(12, 9)
    expected = getattr(integrators, name)(Y, G, G, 0.15).dense()
    assert torch.allclose(getattr(fields, name)(Y, lambda t, Y: G, 1.0, 0.3).dense(), expected, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (3, 10), (10, 3)])
@pytest.mark.parametrize(("name", "order"), [("augmented_bug", 1), ("midpoint_bug", 2)])
def test_the_midpoint_rule_makes_bug_one_order_better(name, order, rows, columns):
    """Where the field leads out of rank one and the rank follows the tolerance, errors are those of bases.

    Also where bases of one side are full, and those of the other go on growing.
    """
    W1, H = (torch.randn(rows, rows) / rows**0.5 for _ in range(2))
    W2, B = (torch.randn(columns, columns) / columns**0.5 for _ in range(2))

    def F(t, Y):
        U = torch.cat([W1 @ Y.U, Y.U, math.cos(2 * t) * H @ Y.U], dim=1)
        V = torch.cat([Y.V, W2 @ Y.V, B @ Y.V], dim=1)
        return LowRank(U, torch.block_diag(Y.S, Y.S, Y.S), V)

    def slope(t, X):
        return W1 @ X + X @ W2.mT + math.cos(2 * t) * H @ X @ B.mT

    start = LowRank.from_dense(torch.outer(torch.randn(rows), torch.randn(columns)) / rows, rank=1)
    X, counts, errors = start.dense(), (20, 40, 80), []
    for n in range(200):
        X = fields.rk4(slope, X, n / 400, 1 / 400)
    for steps in counts:
        Y = start
        for n in range(steps):
            Y = getattr(fields, name)(Y, F, n / steps / 2, 1 / steps / 2, tau=1e-10)
        errors.append((Y.dense() - X).norm().item())
    assert abs(-np.polyfit(np.log(counts), np.log(errors), 1)[0] - order) <= 0.1, errors


@pytest.mark.parametrize("name", STEPS)
def test_on_a_path_of_exact_rank_the_error_is_that_of_runge_kutta_alone(name):
    """F(t, Y) = A'(t) with A of rank three: order four, whatever the order of the integrator."""
    R = torch.randn(12, 12)
    W = (R - R.mT) / 4
    A0 = LowRank.from_dense(torch.randn(12, 12), rank=3)

    def A(t):
        return torch.matrix_exp(t * W) @ A0.dense() @ torch.matrix_exp(-t * W)

    counts = (5, 10, 20)
    errors = [
        (follow(lambda t, Y: W @ A(t) - A(t) @ W, A0, STEPS[name], 3, steps).dense() - A(1.0)).norm()
        for steps in counts
    ]
    assert errors[-1] < 1e-4
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 3.8


@pytest.mark.parametrize("seed", range(2))
def test_bug_shows_its_first_order_on_schroedinger(seed):
    counts = (20, 40, 100)
    errors = [schroedinger_error(seed, "bug", steps) for steps in counts]
    assert 10 <= errors[0] <= 25
    assert abs(-np.polyfit(np.log(counts), np.log(errors), 1)[0] - 0.95) <= 0.05


@pytest.mark.parametrize("name", ["augmented", "midpoint", "ksl", "strang"])
@pytest.mark.parametrize("seed", range(2))
def test_the_others_stay_near_the_best_on_schroedinger(seed, name):
    assert schroedinger_error(seed, name, 20) <= 1.6


def test_projector_splitting_keeps_the_norm_and_bug_does_not():
    F, start, _ = schroedinger(0)
    drift = {}
    for name in ("ksl", "bug"):
        Y = follow(F, start(8), STEPS[name], 16, 100)
        drift[name] = abs(Y.S.norm() / start(8).S.norm() - 1)
    assert drift["ksl"] <= 1e-8
    assert drift["bug"] > 1e-4
