"""One step of one low-rank weight: its gradient, its velocity, K-, L- and S-step, and the cut afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dlrt.augmented import formed
from dlrt.checks import is_orthonormal
from dlrt.distributed import check_bases_may_rest, check_ranks_may_move
from dlrt.integrators import Direction, augment, galerkin, parallel_step, update_bases
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank
from dlrt.moments import forget_moments, remember_gradient, rotate_moments
from dlrt.velocity import Tangent, Velocity, adam, carried, coefficients, rotate_squares, rule_of


@dataclass(frozen=True, eq=False)
class WeightStep:
    """What a DLRT does with a layer: `state` is the optimizer's, by parameter, `group` holds the settings.

    While bases rest they are augmented, U (m, k) and V (n, l), and S (k, l) alone is trained; the layer keeps
    its rank r in the state.
    """

    layer: LowRankLayer
    name: str
    state: dict[torch.nn.Parameter, dict[str, Any]]
    group: dict[str, Any]

    @property
    def beta(self) -> float:
        """The share of the velocity that stays in a step."""
        return self.group["momentum"] if "momentum" in self.group else self.group["betas"][0]

    @property
    def h(self) -> float:
        """The step size: update_lr, and of a scaled rule √max(1, m/n) times as much."""
        scale = rule_of(self.group["update"]).scale(self.layer.shape)
        return self.group["lr"] * self.group["update_share"] * scale

    @property
    def kept_rank(self) -> int:
        """The rank before the bases were augmented."""
        kept = None if self.layer.trains_bases else self.state[self.layer.S].get("rank")
        return kept or self.layer.rank

    @property
    def velocity(self) -> Velocity | None:
        """M of the last step; of a layer whose bases rest, in these alone."""
        U, V, _ = self._factors
        past = ((factor, self.state[factor].get("velocity")) for factor in self._factors)
        MV, MU, core = (None if product is None else product.to(factor) for factor, product in past)
        if core is None:
            return None
        return LowRank(U, core, V) if MV is None else Tangent(U, V, MV, MU, core)

    def gradient(self) -> Tangent:
        """∇_W L, by what the backward pass has left in .grad; λ W = U (λ S) Vᵀ adds to core alone."""
        group, (U, V, S) = self.group, self._factors
        decay = 0.0 if group["decoupled"] else group["weight_decay"]
        core = (-S.grad if group["maximize"] else S.grad) + decay * S
        if not self.layer.trains_bases:
            return Tangent(U, V, None, None, core)
        GV, GU = (torch.zeros_like(B) if B.grad is None else B.grad for B in (U, V))
        return Tangent(U, V, *((-GV, -GU) if group["maximize"] else (GV, GU)), core)

    def accelerate(self, G: Tangent, keep: bool = True) -> tuple[Tangent, Tangent]:
        """The velocity M = β M + G, as torch's SGD has it, and what the step goes along: M, or G + β M.

        Without `keep` the optimizer's state stays what it is.
        """
        beta, (U, V, S) = self.beta, self._factors
        if not beta:
            return G, G
        gain = 1 - beta if self.group["update"] == "adam" else 1.0

        def mixed(g: Tensor | None, factor: torch.nn.Parameter) -> Tensor | None:
            past = self.state[factor].get("velocity")
            if g is None or past is None:
                return None if g is None else gain * g
            return past.to(g, copy=not keep).mul_(beta).add_(g, alpha=gain)

        M = replace(G, MV=mixed(G.MV, U), MU=mixed(G.MU, V), core=mixed(G.core, S))
        if keep:
            self._remember(M.MV, M.MU, M.core)
        if not self.group["nesterov"]:
            return M, M
        ahead = ((g if g is None else g.add(m, alpha=beta)) for g, m in ((G.MV, M.MV), (G.MU, M.MU)))
        return M, Tangent(G.U, G.V, *ahead, G.core.add(M.core, alpha=beta))

    def parallel_step(self) -> tuple[LowRank, Velocity]:
        """The factors in augmented bases after K-, L- and S-step along the velocity; and the velocity."""
        M, N, rule = self._along()
        Y_hat, D = parallel_step(self._decayed(), N.MV, N.MU, -self.h, N.core, rule)
        return Y_hat, LowRank(Y_hat.U, D, Y_hat.V) if M is N else M

    def s_step(self) -> tuple[LowRank, Velocity]:
        """The factors after the S-step alone, in the bases as they are; and the velocity."""
        Y = self._decayed()
        M, N, rule = self._along()
        S1 = Y.S - self.h * rule(N.core, Y)
        return LowRank(Y.U, S1, Y.V), M if self.layer.trains_bases else LowRank(Y.U, M.core, Y.V)

    def update_bases(self) -> None:
        """K- and L-step of an integrator that takes its S-step by another pass; the velocity goes along."""
        Y, M = self.layer.factors, self.velocity
        _, N = self.accelerate(self.gradient(), keep=False)
        if self.group["integrator"] == "augmented":
            self.rest(augment(Y, N.MV, N.MU), M)
        else:
            Y1 = update_bases(Y, N @ Y.V, N.T @ Y.U, -self.h)
            self._put(Y1, *(() if M is None else (M @ Y1.V, M.T @ Y1.U, galerkin(M, Y1))))

    def carry_from(self, U: Tensor, V: Tensor) -> None:
        """Carry the velocity from these bases into those that the layer has by now, by projection.

        So too the means of the gradient's squares; second moments, where the new bases lie within the old.
        """
        Y = self.layer.factors
        U, V = U.to(Y.U), V.to(Y.V)
        if U.shape == Y.U.shape and torch.equal(U, Y.U) and torch.equal(V, Y.V):
            return
        past = (self.state[factor].get("velocity") for factor in self._factors)
        MV, MU, core = (product if product is None else product.to(Y.S) for product in past)
        if MV is not None:
            M = Tangent(U, V, MV, MU, core)
            self._remember(M @ Y.V, M.T @ Y.U, galerkin(M, Y))
        elif core is not None:  # bases rest
            self._remember(None, None, galerkin(LowRank(U, core, V), Y))
        P, Q = U.mT @ Y.U, V.mT @ Y.V
        if not is_orthonormal(P, Q):  # what nothing is known of may be needed
            forget_moments(self.state[self.layer.S])
        self._rotate(P, Q)

    def rest(self, Y_hat: LowRank, M: Velocity | None) -> None:
        """Leave the layer in these bases, and of the velocity what lies in them."""
        if self.layer.trains_bases:
            check_bases_may_rest(self.layer.S, self.name)
        rank = self.kept_rank
        Y_hat = LowRank(formed(Y_hat.U), Y_hat.S, formed(Y_hat.V))
        self._put(Y_hat, None, None, None if M is None else coefficients(M, Y_hat))
        self.state[self.layer.S]["rank"] = rank
        self.layer.trains_bases = False

    def stay(self, Y1: LowRank) -> None:
        """Take new coefficients in the present bases, to which the velocity belongs."""
        self._put(Y1, *(self.state[factor].get("velocity") for factor in self._factors))

    def cut(self, Y_hat: LowRank, M: Velocity | None, P: Tensor, S1: Tensor, Q: Tensor) -> None:
        """Leave the layer at Û P S1 Qᵀ V̂ᵀ, and the velocity in its tangent space; then its bases train."""
        self._rotate(P, Q)
        if M is not None and self.beta:
            U, V, *velocity = carried(M, Y_hat, P, Q)
        else:
            U, V, *velocity = Y_hat.U @ P, Y_hat.V @ Q
        self._put(LowRank(U, S1, V), *velocity)
        self.layer.trains_bases = True

    def _rotate(self, P: Tensor, Q: Tensor) -> None:
        """Write second moments and mean squares of the gradient in the bases Û P, V̂ Q."""
        state = self.state[self.layer.S]
        rotate_squares(state, P, Q)
        rotate_moments(state, P, Q)

    def _along(self) -> tuple[Tangent, Tangent, Direction]:
        """Velocity, what the step goes along, and the rule; the gradient is used up."""
        U, V, S = self._factors
        G, group, state = self.gradient(), self.group, self.state[S]
        M, N = self.accelerate(G)
        U.grad = V.grad = None
        rule = rule_of(group["update"])

        def direction(D: Tensor, Y_hat: LowRank) -> Tensor:
            if group["cut_by"] == "loss" and not group["frozen"]:
                core = S.grad if G.MV is None else U.mT @ G.MV  # without decay, or a penalty on S
                remember_gradient(state, replace(G, core=core), Y_hat)
            if group["update"] == "adam":
                return adam(D, coefficients(G, Y_hat), state, group["betas"], group["eps"])
            return rule(D)

        return M, N, direction

    def _decayed(self) -> LowRank:
        group, (U, V, S) = self.group, self._factors
        shrink = 1 - group["lr"] * group["weight_decay"] if group["decoupled"] else 1
        return LowRank(U, shrink * S, V)

    def _put(self, Y1: LowRank, *velocity: Tensor | None) -> None:
        """Give the layer new factors, and their velocity; old gradients are not theirs."""
        *_, S = self._factors
        if Y1.S.shape != S.shape:
            check_ranks_may_move(S, self.name)
        for factor in self._factors:
            factor.grad = None
        self.layer.write(Y1)
        self._remember(*(velocity if self.beta else ()))

    @cached_property
    def _factors(self) -> tuple[torch.nn.Parameter, ...]:
        return self.layer.U, self.layer.V, self.layer.S

    def _remember(
        self, MV: Tensor | None = None, MU: Tensor | None = None, core: Tensor | None = None
    ) -> None:
        for factor, product in zip(self._factors, (MV, MU, core), strict=True):
            self.state[factor].pop("velocity", None)
            if product is not None:
                self.state[factor]["velocity"] = product
