"""Landau damping, the problem of Einkemmer & Lubich, SIAM J. Sci. Comput. 40 (2018): low rank in x and v.

Electrons f(t, x, v) over a uniform background: f' = -v ∂x f + E ∂v f, ∂x E = 1 - ∫ f dv, from a Maxwellian
that is disturbed by 1 % with wave number 1/2. Linear theory gives the electric field the frequency 1.4156 and
the damping rate 0.1533; the equation keeps mass and energy, the integrators only as well as they solve it.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch

from dlrt import LowRank, fields

pytestmark = pytest.mark.usefixtures("float64")

WAVE, DISTURBANCE, FASTEST = 0.5, 0.01, 6.0
POSITIONS, VELOCITIES, RANK, DURATION, STEPS = 32, 64, 6, 15.0, 300


def derivative(points, length):
    """The matrix of the spectral derivative of periodic functions."""
    frequencies = 2j * math.pi * torch.fft.fftfreq(points, length / points).to(torch.complex128)
    frequencies[points // 2] = 0
    return torch.fft.ifft(frequencies[:, None] * torch.fft.fft(torch.eye(points), dim=0), dim=0).real


@cache
def landau(name):
    """The electric energy, the mass and the total energy in each step."""
    length = 2 * math.pi / WAVE
    x = length / POSITIONS * torch.arange(POSITIONS)
    dx, dv = length / POSITIONS, 2 * FASTEST / VELOCITIES
    v = -FASTEST + dv * torch.arange(VELOCITIES)
    Dx, Dv = derivative(POSITIONS, length), derivative(VELOCITIES, 2 * FASTEST)
    integrate_x = torch.linalg.pinv(Dx)

    def electric(Y):
        return integrate_x @ (1 - dv * (Y @ torch.ones(VELOCITIES, 1)))[:, 0]

    def F(t, Y):
        U = torch.cat([-Dx @ Y.U, electric(Y)[:, None] * Y.U], dim=1)
        return LowRank(U, torch.block_diag(Y.S, Y.S), torch.cat([v[:, None] * Y.V, Dv @ Y.V], dim=1))

    density = 1 + DISTURBANCE * torch.cos(WAVE * x)
    maxwellian = torch.exp(-v.square() / 2) / math.sqrt(2 * math.pi)
    Y, h, found = LowRank.from_dense(torch.outer(density, maxwellian), rank=RANK), DURATION / STEPS, []
    options = {"max_rank": RANK} if name in ("augmented_bug", "midpoint_bug") else {}
    for n in range(STEPS + 1):
        f, field = Y.dense(), dx * electric(Y).square().sum() / 2
        kinetic = dx * dv * (f @ v.square()).sum() / 2
        found.append([field.item(), (dx * dv * f.sum()).item(), (kinetic + field).item()])
        Y = getattr(fields, name)(Y, F, n * h, h, **options)
    return np.array(found).T


@pytest.mark.parametrize("name", ["augmented_bug", "midpoint_bug", "projector_splitting", "strang"])
def test_the_field_decays_and_oscillates_as_landau_says(name):
    electric = landau(name)[0]
    times = np.linspace(0, DURATION, STEPS + 1)
    peaks = [n for n in range(1, STEPS) if electric[n - 1] < electric[n] > electric[n + 1]]
    rate = np.polyfit(times[peaks], np.log(electric[peaks]) / 2, 1)[0]
    frequency = math.pi / np.diff(times[peaks]).mean()
    assert abs(rate + 0.1533) <= 0.003
    assert abs(frequency - 1.4156) <= 0.02


@pytest.mark.parametrize("name", ["augmented_bug", "midpoint_bug", "projector_splitting", "strang"])
def test_mass_and_energy_are_kept(name):
    _, mass, energy = landau(name)
    assert np.abs(mass / mass[0] - 1).max() <= 1e-6
    assert np.abs(energy / energy[0] - 1).max() <= 1e-6
