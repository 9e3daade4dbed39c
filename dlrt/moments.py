"""What of a weight its loss needs, by the gradients of training: their second moments in the bases.

To second order a change D of W = U S Vᵀ raises the loss by about a multiple of ‖√L D √R‖², where L = E[G Gᵀ]
and R = E[Gᵀ G] for the gradient G: L ⊗ R over its trace is close to the Kronecker product that is nearest to
E[vec(G) vec(G)ᵀ] (Gupta et al. 2018, Shampoo; Morwani et al. 2024, arXiv:2406.17748). What is kept of them is
Ûᵀ L Û and V̂ᵀ R V̂ for the tangent part of G: as little as S is, and without another pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlrt.integrators import pad

MEMORY = 20  # gradients, of the mean
LEAST = 10  # gradients, before which they say too little


def remember_gradient(state: dict[str, Any], C: Tensor) -> None:
    """Take the coefficients C = Ûᵀ G V̂ (k, l) of a gradient into the means `left` (k, k) and `right` (l, l).

    The bases may have grown: directions without a past begin with what this gradient says of them.
    """
    state["gradients"] = state.get("gradients", 0) + 1
    share = 1 / min(state["gradients"], MEMORY)
    for name, now in (("left", C @ C.mT), ("right", C.mT @ C)):
        past = state.get(name, now)
        known = len(past)
        state[name] = torch.block_diag(past, now[known:, known:]).lerp(now, share)


def moments(state: dict[str, Any], S: Tensor) -> tuple[Tensor, Tensor] | None:
    """`right` (l, l) and `left` (k, k) for S (k, l); None after too few gradients.

    Nothing is known of directions by which the bases have grown since; S is zero in them.
    """
    if state.get("gradients", 0) < LEAST:
        return None
    rows, columns = S.shape
    return pad(state["right"], (columns, columns)), pad(state["left"], (rows, rows))


def rotate_moments(state: dict[str, Any], P: Tensor, Q: Tensor) -> None:
    """Write both in the bases Û P (k, r) and V̂ Q (l, s)."""
    for name, B in (("left", P), ("right", Q)):
        if name in state:
            state[name] = B.mT @ pad(state[name], (len(B), len(B))) @ B
