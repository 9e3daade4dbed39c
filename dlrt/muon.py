"""Muon on dense weights, the baseline of `DLRT(update="muon")`, which is this at full rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dlrt.velocity import muon


class Muon(torch.optim.SGD):
    """SGD with momentum, but weights of the given modules (matrices, kernels) move by √max(1, m/n) msign(M).

    M is their momentum buffer as a matrix (m, n), the step size is update_lr (0.3 lr by default), and their
    weight decay is decoupled. Jordan et al. 2024.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        modules: Iterable[nn.Module],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        update_lr: float | None = None,
    ) -> None:
        weights = [module.weight for module in modules]
        theirs = {id(weight) for weight in weights}
        rest = [p for p in parameters if id(p) not in theirs]
        share = 0.3 if update_lr is None else update_lr / lr
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__([{"params": rest}, {"params": weights, "update_share": share}], **options)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; gives the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[1]
        taken = [weight for weight in group["params"] if weight.grad is not None]
        for W in taken:
            state = self.state[W]
            M = state["velocity"] = group["momentum"] * state.get("velocity", 0) + W.grad
            N = (W.grad + group["momentum"] * M if group["nesterov"] else M).flatten(1)
            h = group["lr"] * group["update_share"] * max(1, N.shape[0] / N.shape[1]) ** 0.5
            W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(h * muon(N, {}, {}).view_as(W))
        gradients = [weight.grad for weight in taken]
        for weight in taken:
            weight.grad = None  # the rest is SGD's
        super().step()
        for weight, gradient in zip(taken, gradients, strict=True):
            weight.grad = gradient
        return loss
