"""What DLRT is compared with: Muon on dense weights, and plain factors W = A B with any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dlrt.convert import replace_layers, to_low_rank
from dlrt.costs import budget_between
from dlrt.factors import Factors, plain_layer
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank, truncate
from dlrt.ranks import parameters
from dlrt.velocity import RULES, msign, update_share

SHARES = tuple(k / 200 for k in range(200, -1, -1))  # of the full rank; a rank is 1 at least


class Muon(torch.optim.Optimizer):
    """A torch optimizer, but weights of the given modules (matrices, kernels) move by √max(1, m/n) msign(M).

    M is their momentum buffer as a matrix (m, n), the step size is update_lr (0.3 lr by default), and their
    weight decay is decoupled. The torch class (**options are its arguments) steps all else; an Adam's first
    beta is the momentum. `DLRT(update="muon")` is this at full rank. Jordan et al. 2024.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        modules: Iterable[nn.Module],
        lr: float,
        update_lr: float | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        if options.get("dampening") or options.get("maximize"):
            wrong = {name: options[name] for name in ("dampening", "maximize") if options.get(name)}
            raise ValueError(f"muon has neither dampening nor maximize here, got {wrong}: leave them out")
        weights = [module.weight for module in modules]
        ids = {id(weight) for weight in weights}
        rest = [p for p in parameters if id(p) not in ids]
        share = update_share(RULES["muon"], update_lr, lr)
        self.inner = optimizer_class([{"params": rest}], lr=lr, **options)
        groups = [*self.inner.param_groups, {"params": weights, "update_share": share}]
        super().__init__(groups, self.inner.defaults)
        self.inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; gives the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.inner.param_groups = [group for group in self.param_groups if "update_share" not in group]
        self.inner.step()
        for group in self.param_groups:
            for W in group["params"] if "update_share" in group else ():
                if W.grad is not None:
                    self._move(W, group)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.inner.state = self.state

    def _move(self, W: Tensor, group: dict) -> None:
        state, beta = self.state[W], group["momentum"] if "momentum" in group else group["betas"][0]
        M = state["velocity"] = beta * state.get("velocity", 0) + W.grad
        N = (W.grad + beta * M if group.get("nesterov") else M).flatten(1)
        h = group["lr"] * group["update_share"] * RULES["muon"].scale(N.shape)
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(h * msign(N).view_as(W))


def plain_factors(
    model: nn.Module, compression: float, skip: Iterable[str] = (), spatial: bool = False
) -> nn.Module:
    """Replace a dense model's layers, in place, by A = U √Σ and B = √Σ Vᵀ of what `uniform_cut` leaves.

    A layer whose factors would not be smaller stays dense; so does what skip names, and what `to_low_rank`
    leaves dense. Separable kernels become two convolutions like any other, also for Muon. Give the model
    back. ValueError as there.
    """
    return to_plain_factors(uniform_cut(model, compression, skip=skip, spatial=spatial))


@torch.no_grad()
def uniform_cut(
    model: nn.Module, compression: float, skip: Iterable[str] = (), spatial: bool = False
) -> nn.Module:
    """Make a dense model low-rank, in place, all layers alike; give it back.

    All have one share of their full rank, up to rounding, the largest at which the whole model meets the
    compression, a fraction. skip and spatial are those of `to_low_rank`. ValueError for a compression that is
    out of reach; the model is of full rank then.
    """
    model = to_low_rank(model, skip=skip, spatial=spatial)
    layers = [module for module in model.modules() if isinstance(module, LowRankLayer)]
    _, budget = budget_between(model, layers, compression, [1] * len(layers))

    def cost(ranks: list[int]) -> int:
        return sum(parameters(r, layer.shape) for r, layer in zip(ranks, layers, strict=True))

    uniform = ([max(1, int(share * min(layer.shape))) for layer in layers] for share in SHARES)
    ranks = next(ranks for ranks in uniform if cost(ranks) <= budget)
    for i, layer in enumerate(layers):  # what is left over lets some have one more
        more = [*ranks[:i], min(ranks[i] + 1, *layer.shape), *ranks[i + 1 :]]
        ranks = more if cost(more) <= budget else ranks
    for layer, r in zip(layers, ranks, strict=True):
        layer.factors = truncate(layer.factors, max_rank=r)
    return model


@torch.no_grad()
def to_plain_factors(model: nn.Module) -> nn.Module:
    """Make every low-rank layer of a model, in place, A = U √Σ and B = √Σ Vᵀ of its SVD; give the model back.

    A layer whose factors would cost as much as its weight becomes dense.
    """
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            layer.factors = balanced(layer.factors)
    return replace_layers(model, as_factors)


def balanced(Y: LowRank) -> LowRank:
    """U √Σ, I, V √Σ of the SVD: the same matrix, its two factors of equal norm."""
    Y = truncate(Y)
    root = Y.S.sqrt()
    return LowRank(Y.U @ root, torch.eye(Y.rank).to(root), Y.V @ root)


def as_factors(layer: LowRankLayer) -> nn.Module:
    """Two thin layers of torch with the same map, or a dense one where that costs less."""
    plain = plain_layer(layer)
    return Factors(*plain) if isinstance(plain, nn.Sequential) else plain


def product_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer's weight decay shrink products A B, as it shrinks dense weights, and not A and B.

    Frobenius decay, of ‖A B‖² / 2, whose gradients are A (B Bᵀ) and (Aᵀ A) B; each step first shrinks by lr
    times it. Of SGD, where decay goes through the momentum, it is worth 1 / (1 - momentum) as much. Khodak et
    al. 2021.
    """
    pairs = [module for module in model.modules() if isinstance(module, Factors)]
    factors, decay = {id(layer.weight) for pair in pairs for layer in pair}, 0.0
    for group in list(optimizer.param_groups):
        factor_weights = [p for p in group["params"] if id(p) in factors]
        if factor_weights:
            momentum = 0.0 if "update_share" in group else group.get("momentum", 0.0)
            decay = group["weight_decay"] / (1 - momentum)
            group["params"] = [p for p in group["params"] if id(p) not in factors]
            optimizer.add_param_group({**group, "params": factor_weights, "weight_decay": 0.0})

    @torch.no_grad()
    def shrink(*_) -> None:
        lr = optimizer.param_groups[0]["lr"]
        for pair in pairs:
            (first, second), (B, A) = (layer.weight for layer in pair), pair.matrices()
            gradient_B, gradient_A = (A.mT @ A) @ B, A @ (B @ B.mT)
            first.sub_(gradient_B.view_as(first), alpha=lr * decay)
            second.sub_(gradient_A.view_as(second.movedim(1, -1)).movedim(-1, 1), alpha=lr * decay)

    if decay:
        optimizer.register_step_pre_hook(shrink)
