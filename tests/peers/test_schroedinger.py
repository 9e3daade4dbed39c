"""The discrete Schrödinger equation of Ceruti, Kusch & Lubich, BIT 62 (2022), section 6.1, as a public code
(github.com/cmendl/bug_integrator) poses it: seed 42, start of rank 12, truncation to 1e-6; the longest steps.

i X' = H[X] = (D X + X D) / 2 + V X V with D = tridiag(-1, 2, -1), V = diag(1 - cos x). The norm stays 1,
so the relative tolerance is an absolute one.
"""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from test_fields import N, as_real, schroedinger_field

from dlrt import LowRank, fields

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE, RANK = 1e-6, 12


@cache
def problem():
    """The start of rank 12, and the solution at t = 1 from the whole start."""
    rng = np.random.default_rng(42)
    U, V = (torch.from_numpy(ortho_group.rvs(N, random_state=rng)) for _ in range(2))
    sigma = 0.1 ** torch.arange(1, N + 1)
    sigma = sigma / sigma.norm()
    X = (U * sigma @ V.mT).to(torch.complex128)
    potential = 1 - torch.cos(2 * torch.pi * torch.arange(-N // 2, N // 2) / N)

    def slope(t, X):
        padded = torch.nn.functional.pad(torch.view_as_real(X).permute(2, 0, 1), (1, 1, 1, 1))
        padded = torch.complex(*padded)
        neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        return -1j * (2 * X - neighbours / 2 + potential[:, None] * potential * X)

    for n in range(800):
        X = fields.rk4(slope, X, n / 800, 1 / 800)
    start = LowRank(as_real(U[:, :RANK]), as_real(sigma[:RANK].diag()), as_real(V[:, :RANK]))
    return start, X


@pytest.mark.parametrize(
    ("name", "steps"),
    [("augmented_bug", 10), ("augmented_bug", 20), ("augmented_bug", 50), ("midpoint_bug", 20)],
)
def test_the_error_is_that_of_runge_kutta_and_of_truncation(name, steps):
    """30 h⁴ from the sub-steps, which long steps suffer from, and at most 1e-6 from each truncation."""
    Y, X = problem()
    F = schroedinger_field()
    for n in range(steps):
        Y = getattr(fields, name)(Y, F, n / steps, 1 / steps, tau=TOLERANCE)
    found = torch.complex(Y.dense()[::2, ::2], Y.dense()[1::2, ::2])
    assert (found - X).norm() <= 30 / steps**4 + steps * TOLERANCE
    assert 2 * 18 <= Y.rank <= 2 * 35
