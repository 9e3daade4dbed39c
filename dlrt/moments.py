"""What of a weight its loss needs, by the gradients of training: their second moments in the bases.

To second order a change D of W = U S Vᵀ raises the loss by about a multiple of ‖√left D √right‖², where
left = E[G Gᵀ] and right = E[Gᵀ G] for the gradient G of a batch, while the noise of batches dominates it.
left ⊗ right over its trace is close to the Kronecker product that is nearest to E[vec(G) vec(G)ᵀ] (Gupta et
al. 2018, Shampoo; Morwani et al. 2024, arXiv:2406.17748). What is kept is Ûᵀ left Û and V̂ᵀ right V̂, together
twice the size of S, and without another pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlrt.integrators import pad
from dlrt.lowrank import LowRank
from dlrt.velocity import Tangent, coefficients

MEMORY = 20  # the mean is over about so many of the last gradients
LEAST = 10  # a mean of fewer gradients says too little
MOMENT_DAMPING = 1e-3  # of the norm: what few gradients say nothing of may be needed
KEYS = ("left", "right")


def remember_gradient(state: dict[str, Any], G: Tangent, Y_hat: LowRank) -> None:
    """Take a gradient G (m, n) into the means `left` (k, k) and `right` (l, l), in the bases of Ŷ.

    In U and V it is known whole, by Gᵀ U and G V; in directions that Ŷ adds to them, by its part in the bases
    of Ŷ. Of those the mean begins with this gradient.
    """
    C = coefficients(G, Y_hat)
    left, right = C @ C.mT, C.mT @ C
    if G.MV is not None:
        r, s = G.core.shape
        left[:r, :r], right[:s, :s] = G.MU.mT @ G.MU, G.MV.mT @ G.MV
    state["gradients"] = state.get("gradients", 0) + 1
    share = 1 / min(state["gradients"], MEMORY)
    for key, now in zip(KEYS, (left, right), strict=True):
        past = state.get(key, now).to(now)
        known = len(past)
        state[key] = torch.block_diag(past, now[known:, known:]).lerp(now, share)


def second_moments(state: dict[str, Any], S: Tensor) -> tuple[Tensor, Tensor] | None:
    """`right` (l, l) and `left` (k, k) for S (k, l); None after too few gradients.

    They are zero in directions by which the bases have grown since, as S is.
    """
    if state.get("gradients", 0) < LEAST:
        return None
    rows, columns = S.shape
    return pad(state["right"].to(S), (columns, columns)), pad(state["left"].to(S), (rows, rows))


def rotate_moments(state: dict[str, Any], P: Tensor, Q: Tensor) -> None:
    """Write the second moments in the bases Û P and V̂ Q, for P (k, r) and Q (l, s)."""
    for key, B in zip(KEYS, (P, Q), strict=True):
        if key in state:
            state[key] = B.mT @ pad(state[key].to(B), (len(B), len(B))) @ B


def forget_moments(state: dict[str, Any]) -> None:
    for key in (*KEYS, "gradients"):
        state.pop(key, None)
