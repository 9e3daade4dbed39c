"""DLRT: an optimizer that moves low-rank weights by an integrator, and all else by a torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlrt.checks import check_factors, check_orthonormal, check_tolerance
from dlrt.costs import budget_between
from dlrt.distributed import check_ranks_may_move
from dlrt.integrators import Operator, augment, galerkin, parallel_step, update_bases
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank, truncate, truncate_to
from dlrt.ranks import allot, falling_budget, worths
from dlrt.settings import check_integration, low_rank_group, low_rank_layers, update_for
from dlrt.velocity import RULES, Tangent, add_squares, tangent_at, turn_squares

Moved = dict[LowRankLayer, tuple[LowRank, Operator | None]]


class DLRT(torch.optim.Optimizer):
    """Train a model with low-rank layers: one `step()` after one ordinary forward and backward pass.

        optimizer = DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.1)

    The torch class (**options are its arguments) steps biases, norms and dense layers. A low-rank weight
    moves by an integrator along its velocity, a tangent vector, with h = lr. `update` is the rule that acts
    on the small matrix D, "sgd", "adam" or "muon" (default: as the class). "muon" moves by
    update_lr √max(1, m/n) msign(D), with update_lr = 0.3 lr by default and decoupled weight decay. At full
    rank without truncation a step is that of torch's SGD, or of Muon. Schedulers change both alike.

    Integrators: "parallel" takes one pass (Ceruti, Kusch & Lubich 2024). "augmented" updates the bases by
    one pass and S by another (Ceruti, Kusch & Lubich 2022; Schotthöfer et al. 2022), and so does "bug", which
    keeps the rank (Ceruti & Lubich 2022): both call `step(closure)`, which evaluates the closure twice.

    Ranks are decided in every `allot_every`-th step, and constant in between. tau (default 0.1, or 0 with a
    budget) is the share of ‖S‖ that is truncated then, an attribute that may change. compression, a fraction,
    is a budget for the parameters of the whole model: it falls along a cubic from the present ranks over
    `ramp` steps, and the singular values of all layers compete for it. The smaller rank wins. min_rank and
    max_rank bound each layer's; "initial" stands for what it is now. With s_steps = n the bases are updated
    in every n-th step only, and S is trained in the augmented bases in between.

    A layer belongs to the last DLRT that was made of it; an earlier one refuses to step. ValueError for an
    impossible option and for bases that are not orthonormal.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        update: str | None = None,
        update_lr: float | None = None,
        tau: float | None = None,
        compression: float | None = None,
        ramp: int | None = None,
        allot_every: int = 10,
        integrator: str = "parallel",
        min_rank: int = 2,
        max_rank: int | Literal["initial"] | None = None,
        s_steps: int = 1,
        **options: Any,
    ) -> None:
        names, update = low_rank_layers(model), update or update_for(optimizer_class)
        tau = (0.1 if compression is None else 0.0) if tau is None else tau
        check_integration(
            update, integrator, s_steps, tau, min_rank, max_rank, compression, ramp, allot_every
        )
        self.integrator, self.s_steps, self.allot_every = integrator, s_steps, allot_every
        self.min_rank, self.max_rank = min_rank, max_rank
        self.names = {layer: name for layer, name in names.items() if layer.S.requires_grad}
        factors = {id(factor) for layer in names for factor in (layer.U, layer.S, layer.V)}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
        self.inner = optimizer_class([{"params": rest}], **options)
        group = low_rank_group(self.inner.defaults, update, update_lr)
        group |= {"tau": tau, "steps": 0, "taken": 0, "frozen": False, "allot_at": 0}
        group["initial_ranks"] = [layer.rank for layer in self.names]
        if compression is not None:
            group["budget"] = *budget_between(model, self.names, compression, min_rank), ramp
        group["params"] = [factor for layer in self.names for factor in (layer.U, layer.S, layer.V)]
        super().__init__([*self.inner.param_groups, group], self.inner.defaults)
        self.inner.state = self.state
        for layer in names:
            rows, columns = layer.S.shape  # differ where another DLRT has yet to truncate: bases rest
            layer.trains_bases = layer in self.names and rows == columns
        for layer in self.names:
            layer.owner = weakref.ref(self)

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group of all factors, with the settings and the progress of their integrator."""
        return next(group for group in self.param_groups if "update" in group)

    @property
    def tau(self) -> float:
        return self.group["tau"]

    @tau.setter
    def tau(self, value: float) -> None:
        check_tolerance(value)
        self.group["tau"] = value

    @property
    def budget(self) -> int | None:
        """How many parameters the low-rank layers may have by now, in all; None without a budget."""
        group = self.group
        return falling_budget(*group["budget"], group["steps"]) if "budget" in group else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the integrator; gives the closure's loss, if there is a closure.

        FloatingPointError where a gradient is not finite; nothing has moved then, but the bases where it is
        the second pass.
        """
        self._check_owner()
        two_passes = self.integrator != "parallel" and not self.group["frozen"]
        if two_passes and closure is None:
            raise RuntimeError(
                f'integrator="{self.integrator}" takes two passes a step: call step(closure), as with LBFGS'
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = self._layers_with_gradient()
        if two_passes and layers:
            self._update_bases(layers)
            self.zero_grad()  # those gradients belong to other weights
            with torch.enable_grad():
                closure()
            layers = self._layers_with_gradient()
        self.inner.param_groups = [group for group in self.param_groups if "update" not in group]
        self.inner.step()
        self._move(layers, two_passes)
        return loss

    def _check_owner(self) -> None:
        """RuntimeError where a layer is another DLRT's by now: velocity and progress here are not its own."""
        for layer, name in self.names.items():
            owner = getattr(layer, "owner", None)
            if owner is None or owner() is not self:
                raise RuntimeError(
                    f"{name} must belong to the DLRT that steps, but was converted or given to a later DLRT: "
                    "step that one, or make a new one"
                )

    def _layers_with_gradient(self) -> list[LowRankLayer]:
        """The layers that took part; FloatingPointError where their gradients are not finite."""
        decides = not self.group["frozen"] and self.group["steps"] + 1 >= self.group["allot_at"]
        for layer, name in self.names.items():
            check_factors(name, layer.S)
            if decides:  # else somebody's clamped or averaged bases would go wrong in silence
                check_orthonormal(name, layer.U, layer.V)
            past = self.state[layer.S].get("velocity")
            if past is not None and past.shape != layer.S.shape:
                raise RuntimeError(
                    f"{name} has a coefficient matrix of shape {tuple(layer.S.shape)}, its velocity "
                    f"{tuple(past.shape)}: load the optimizer's state with the model's, or make a new DLRT"
                )
        layers = [layer for layer in self.names if layer.S.grad is not None]
        gradients = [[p.grad for p in (L.U, L.S, L.V) if p.grad is not None] for L in layers]
        largest = torch._foreach_norm([g for of in gradients for g in of], float("inf")) if layers else []
        if largest and not torch.stack(largest).isfinite().all():
            norms = iter(largest)
            for layer, of in zip(layers, gradients, strict=True):
                if not torch.stack([next(norms) for _ in of]).isfinite().all():
                    raise FloatingPointError(f"the gradient of {self.names[layer]} is not finite")
        return layers

    def _move(self, layers: list[LowRankLayer], two_passes: bool) -> None:
        """K-, L- and S-step of every layer, or the S-step where bases rest; truncation where it is due."""
        group = self.group
        group["steps"] += 1
        group["taken"] += 1
        rests = group["frozen"] or group["taken"] < self.s_steps
        decides = not rests and group["steps"] >= group["allot_at"]
        allots = decides and "budget" in group
        moved = {}
        with _full_precision(self.names):
            for layer in layers:
                s_step_alone = two_passes or not layer.trains_bases
                Y_hat, M = self._s_step(layer) if s_step_alone else self._parallel_step(layer)
                if rests:
                    self._rest(layer, Y_hat, M)
                elif allots:
                    moved[layer] = Y_hat, M
                else:
                    self._cut(layer, Y_hat, M, decides)
            if decides:
                group["allot_at"] = group["steps"] + self.allot_every
            if allots:
                self._allot(moved, group["allot_at"])
            if not rests:
                self._end_rest(decides)

    def _parallel_step(self, layer: LowRankLayer) -> tuple[LowRank, Operator]:
        """The factors in augmented bases after K-, L- and S-step along the velocity; and the velocity."""
        Y = self._decayed(layer)
        M, N = self._accelerate(layer)
        return parallel_step(Y, N, -self._step_size(layer), lambda *at: self._direction(layer, *at)), M

    def _s_step(self, layer: LowRankLayer) -> tuple[LowRank, Operator]:
        """The factors after the S-step alone, in the bases as they are; and the velocity."""
        Y = self._decayed(layer)
        M, N = self._accelerate(layer)
        S1 = Y.S - self._step_size(layer) * self._direction(layer, N.core, Y)
        return LowRank(Y.U, S1, Y.V), M if layer.trains_bases else LowRank(Y.U, M.core, Y.V)

    def _update_bases(self, layers: list[LowRankLayer]) -> None:
        """K- and L-step of an integrator that takes its S-step by another pass; the velocity goes along."""
        with _full_precision(self.names):
            for layer in (L for L in layers if L.trains_bases):  # others are augmented: a second pass failed
                Y, past = layer.factors, self._past(layer)
                _, N = self._accelerate(layer, keep=False)
                if self.integrator == "bug":
                    self._set(layer, update_bases(Y, N.MV, N.MU, -self._step_size(layer)), past)
                else:
                    self._rest(layer, augment(Y, N.MV, N.MU), past)

    def _gradient(self, layer: LowRankLayer) -> Tangent:
        """∇_W L with weight decay, by what the backward pass has left in .grad."""
        group, Y = self.group, layer.factors
        sign, decay = -1 if group["maximize"] else 1, 0.0 if group["decoupled"] else group["weight_decay"]
        core = layer.S.grad * sign + decay * Y.S
        if not layer.trains_bases:
            return Tangent(Y.U, Y.V, None, None, core)
        products = []
        for basis, of_decay in ((layer.U, (Y.U, Y.S)), (layer.V, (Y.V, Y.S.mT))):
            g = torch.zeros_like(basis) if basis.grad is None else basis.grad
            g = g if sign == 1 else -g
            products.append(torch.addmm(g, *of_decay, alpha=decay) if decay else g)
        return Tangent(Y.U, Y.V, *products, core)

    def _accelerate(self, layer: LowRankLayer, keep: bool = True) -> tuple[Tangent, Tangent]:
        """The velocity M = β M + G, as torch's SGD has it, and what the step goes along: M, or G + β M."""
        group, beta, G = self.group, self._beta, self._gradient(layer)
        gain = 1 - beta if group["update"] == "adam" else 1
        M, N = [], []
        for factor, g in ((layer.U, G.MV), (layer.V, G.MU), (layer.S, G.core)):
            past = self.state[factor].get("velocity")
            if g is None or not beta:
                M.append(g)
            elif past is None:
                M.append(gain * g)
            else:
                M.append(past.to(g, copy=not keep).mul_(beta).add_(g, alpha=gain))
            N.append(torch.add(g, M[-1], alpha=beta) if group["nesterov"] and g is not None else M[-1])
            if keep and beta and g is not None:
                self.state[factor]["velocity"] = M[-1]
        if group["update"] != "adam":  # which takes its squares of them
            layer.U.grad = layer.V.grad = None
        return Tangent(G.U, G.V, *M), Tangent(G.U, G.V, *N)

    @property
    def _beta(self) -> float:
        return self.group["momentum"] if "momentum" in self.group else self.group["betas"][0]

    def _past(self, layer: LowRankLayer) -> Operator | None:
        """The velocity of the last step; of a layer whose bases rest, in these alone."""
        MV, core, MU = (self.state[factor].get("velocity") for factor in (layer.U, layer.S, layer.V))
        if MV is None:
            return None if core is None else LowRank(layer.U, core, layer.V)
        return Tangent(layer.U, layer.V, MV, MU, core)

    def _direction(self, layer: LowRankLayer, D: Tensor, Y_hat: LowRank) -> Tensor:
        """Where S moves, by the update rule; D and Ŷ are velocity and factors in the augmented bases."""
        group, state = self.group, self.state[layer.S]
        if group["update"] == "adam":
            G = self._gradient(layer)
            add_squares(state, G.core if Y_hat.U is layer.U else galerkin(G, Y_hat), group["betas"][1])
        return RULES[group["update"]](D, state, group)

    def _step_size(self, layer: LowRankLayer) -> float:
        group, (m, n) = self.group, layer.shape
        h = group["lr"] * group["update_share"]
        return h * max(1, m / n) ** 0.5 if group["update"] == "muon" else h

    def _decayed(self, layer: LowRankLayer) -> LowRank:
        group, Y = self.group, layer.factors
        shrink = 1 - group["lr"] * group["weight_decay"] if group["decoupled"] else 1
        return LowRank(Y.U, shrink * Y.S, Y.V)

    def _end_rest(self, decides: bool) -> None:
        """Cut the layers whose bases rest; then they train again."""
        self.group["taken"] = 0
        for layer in self.names:
            if not layer.trains_bases:
                self._cut(layer, *self._at(layer), decides)

    def _allot(self, moved: Moved, step: int) -> None:
        """Cut all layers to the ranks that fit the budget of that step."""
        now = {layer: moved.get(layer) or self._at(layer) for layer in self.names}
        spectra = worths([Y_hat.S for Y_hat, _ in now.values()])
        spectra = [worth[: self._max_rank(L)] for L, worth in zip(now, spectra, strict=True)]
        budget = falling_budget(*self.group["budget"], step)
        ranks = allot(budget, spectra, [layer.shape for layer in now], self.min_rank)
        for (layer, (Y_hat, M)), rank in zip(now.items(), ranks, strict=True):
            if layer in moved or not layer.trains_bases or rank < layer.rank:
                self._cut(layer, Y_hat, M, rank=rank)

    def _cut(
        self,
        layer: LowRankLayer,
        Y_hat: LowRank,
        M: Operator | None,
        decides: bool = True,
        rank: int | None = None,
    ) -> None:
        """Truncate by tau and to that rank, or else to the rank that a layer keeps; then its bases train."""
        if self.integrator == "bug":
            Y1 = Y_hat
        elif decides:
            most = min(bound for bound in (rank, self._max_rank(layer), *layer.shape) if bound is not None)
            try:
                Y1 = truncate(Y_hat, self.tau, min(self.min_rank, most), most)
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(
                    f"the SVD of S fails in {self.names[layer]}: {error}"
                ) from error
        else:
            Y1 = truncate_to(Y_hat, self._kept_rank(layer))
        turn_squares(self.state[layer.S], Y_hat, Y1)
        self._set(layer, Y1, M)
        layer.trains_bases = True

    def _max_rank(self, layer: LowRankLayer) -> int | None:
        if self.max_rank == "initial":
            return self.group["initial_ranks"][list(self.names).index(layer)]
        return self.max_rank

    def _kept_rank(self, layer: LowRankLayer) -> int:
        """The rank before the bases were augmented."""
        kept = None if layer.trains_bases else self.state[layer.S].get("rank")
        return kept or layer.rank

    def _at(self, layer: LowRankLayer) -> tuple[LowRank, Operator | None]:
        """Factors and velocity as they are."""
        return layer.factors, self._past(layer)

    def _rest(self, layer: LowRankLayer, Y: LowRank, M: Operator | None) -> None:
        """Leave a layer in these bases, and of the velocity what lies in them."""
        core, rank = None if M is None else galerkin(M, Y), self._kept_rank(layer)
        self._set(layer, Y, None)
        self.state[layer.S]["rank"] = rank
        layer.trains_bases = False
        if core is not None and self._beta:
            self.state[layer.S]["velocity"] = core

    def _set(self, layer: LowRankLayer, Y1: LowRank, M: Operator | None) -> None:
        """Give a layer new factors, and its velocity the products with them; old gradients are not theirs."""
        if Y1.S.shape != layer.S.shape:
            check_ranks_may_move(layer.S, self.names[layer])
        factors = (layer.U, layer.S, layer.V)
        for factor in factors:
            factor.grad = None
        at = tangent_at(M, Y1) if M is not None and self._beta else None  # while M's factors are still there
        layer.factors = Y1
        for factor, name in zip(factors, ("MV", "core", "MU"), strict=True):
            self.state[factor].pop("velocity", None)
            if at is not None:
                self.state[factor]["velocity"] = getattr(at, name)

    @torch.no_grad()
    def truncate(self) -> None:
        """Truncate now, before the last of `s_steps`, to evaluate in between. Then the bases train again.

        RuntimeError where a gradient for the present bases still waits for its step.
        """
        self._check_owner()
        for layer, name in self.names.items():
            if not layer.trains_bases and layer.S.grad is not None and not self.group["frozen"]:
                raise RuntimeError(
                    f"{name} has a gradient for the bases that truncation replaces: "
                    "call step() or zero_grad() first"
                )
        with _full_precision(self.names):
            if not self.group["frozen"]:
                self._end_rest(decides="budget" not in self.group)

    @torch.no_grad()
    def freeze_bases(self) -> None:
        """From now on train S and the rest only: U, V and the ranks stay. A budget is met before."""
        if self.group["frozen"]:
            return
        self.truncate()
        with _full_precision(self.names):
            if "budget" in self.group:
                self._allot({}, self.group["budget"][2])
            for layer in self.names:
                self._rest(layer, *self._at(layer))
        self.group["frozen"] = True

    def __getstate__(self) -> None:
        raise TypeError(
            "a DLRT belongs to its model: copy the model, make a new DLRT and load its state_dict"
        )

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; the factors' group has the ranks and the progress of the integrator."""
        self.group["ranks"] = [list(layer.S.shape) for layer in self.names]
        self.group["resting"] = [not layer.trains_bases for layer in self.names]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a DLRT's state; ValueError unless the model has its own, with its ranks, already."""
        own = next((group for group in state_dict["param_groups"] if "update" in group), None)
        if own is None:
            raise ValueError(
                "the state must be a DLRT's, got one without low-rank layers: load it into that optimizer, "
                "or begin a new DLRT without it"
            )
        ranks = [list(layer.S.shape) for layer in self.names]
        if own["ranks"] != ranks:
            raise ValueError(
                f"the state has ranks {own['ranks']}, the model has {ranks}: load the model's state first"
            )
        super().load_state_dict(state_dict)
        self.inner.state = self.state
        for (layer, name), rests in zip(self.names.items(), own["resting"], strict=True):
            check_orthonormal(name, layer.U, layer.V)
            layer.trains_bases = not rests


def _full_precision(layers: dict[LowRankLayer, str]) -> torch.autocast:
    """Autocast around a step would round what QR and SVD are made of."""
    return torch.autocast(next(iter(layers)).S.device.type, enabled=False)
