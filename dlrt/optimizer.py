"""DLRT: an optimizer that moves bases by a low-rank integrator and all else by a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal

import torch
from torch import Tensor, nn

from dlrt.distributed import sum_over_processes, world_size
from dlrt.gradient import Gradient
from dlrt.integrators import augment, move_bases, pad_like, recompress
from dlrt.layers import LowRankLayer, replace_data
from dlrt.lowrank import LowRank, check_rank_bounds, check_tolerance

INTEGRATORS = ("augmented", "parallel", "bug")
LINEAR_STATE = {"momentum_buffer", "exp_avg", "grad_avg", "ax"}  # averages of gradients or of S
SQUARED_STATE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}  # averages of squares


def in_full_precision(method: Callable) -> Callable:
    """For methods that move factors: autocast around a step would round what QR and SVD are made of."""

    @wraps(method)
    def wrapped(self: DLRT, *args):
        with torch.autocast(next(iter(self.names)).S.device.type, enabled=False):
            return method(self, *args)

    return wrapped


class DLRT(torch.optim.Optimizer):
    """Train a model with low-rank layers: one `step()` after one ordinary forward and backward pass.

        optimizer = DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.1)

    The inner optimizer (a torch.optim class; **inner are its arguments) steps every S, the biases, norms and
    dense layers in one call; its state for S follows the bases. tau is the share of ‖S‖ that each step may
    truncate; it is an attribute and may change between steps. With s_steps = n the bases move in every n-th
    step only: the S-step is then solved by n steps in the augmented bases, an ordinary forward and backward
    pass each, before truncation. QR and SVD cost an n-th, and new directions have n steps to show their
    worth; in between the ranks are up to twice as large. Integrators, with h = lr:

    - "augmented": rank-adaptive BUG; Ceruti, Kusch & Lubich 2022, Schotthöfer et al. 2022.
    - "parallel": the same without the new block of the S-step; keeps no samples. Ceruti, Kusch & Lubich 2024.
    - "bug": the unconventional integrator at fixed rank; Ceruti & Lubich 2022. Its S-step needs the gradient
      at other weights, hence `step(closure)`, which evaluates the closure twice.

    max_rank bounds the rank of every layer; "initial" bounds each layer's by what it is now, so that ranks
    which were chosen for a budget keep to it.

    ValueError for an impossible option, or for an inner optimizer whose state has no law under a change of
    basis.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        tau: float = 0.1,
        integrator: str = "augmented",
        min_rank: int = 2,
        max_rank: int | Literal["initial"] | None = None,
        s_steps: int = 1,
        **inner,
    ) -> None:
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator must be one of {', '.join(INTEGRATORS)}, got {integrator!r}")
        if not isinstance(s_steps, int) or s_steps < 1 or (s_steps > 1 and integrator == "bug"):
            raise ValueError(f's_steps must be a whole number from 1 on, and 1 with "bug", got {s_steps!r}')
        if not isinstance(model, nn.Module):
            raise TypeError(f"the first argument must be the model itself, not {type(model).__name__}")
        check_tolerance(tau)
        if isinstance(max_rank, str) and max_rank != "initial":
            raise ValueError(f'max_rank must be a whole number, "initial" or None, got {max_rank!r}')
        check_rank_bounds(min_rank, None if max_rank == "initial" else max_rank)
        _check_state_names(optimizer_class, inner)
        self.tau, self.integrator, self.min_rank, self.max_rank = tau, integrator, min_rank, max_rank
        self.s_steps, self._taken = s_steps, 0  # S-steps from one move of the bases to the next, and so far
        self.names = {
            module: name or type(module).__name__
            for name, module in model.named_modules()
            if isinstance(module, LowRankLayer)
        }
        if not self.names:
            raise ValueError(
                "the model has no low-rank layer: call dlrt.to_low_rank(model) first, and skip fewer layers"
            )
        self._initial_ranks = {layer: layer.rank for layer in self.names}
        for layer in self.names:  # model.requires_grad_() may have reached them
            layer.U.requires_grad_(False)
            layer.V.requires_grad_(False)
        self.inner = optimizer_class([p for p in model.parameters() if p.requires_grad], **inner)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share_state()
        for layer in self.names:
            if layer.S.requires_grad:
                Gradient(layer, keep_samples=integrator == "augmented")

    def _share_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the integrator; gives the closure's loss, if there is a closure.

        RuntimeError where a layer has a gradient but recorded nothing, FloatingPointError where one is not
        finite. Nothing has moved then, unless it is the second evaluation of "bug", for which the bases have.
        """
        if self.integrator == "bug" and closure is None and self._recording:
            raise RuntimeError(
                'integrator="bug" evaluates the loss twice a step: call step(closure), as with LBFGS'
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = self._layers_to_move()
        if self.integrator == "bug" and layers:
            for layer in layers:
                self._move_bases(layer)
            self.zero_grad()  # those gradients belong to other weights
            with torch.enable_grad():
                closure()
            self._check_finite(layers)
            self.inner.step()
        else:
            self._integrate(layers)
        for layer in layers:
            layer.S.grad = None  # it was the gradient in the old bases
            layer.gradient.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and what the layers recorded for them."""
        super().zero_grad(set_to_none)
        for layer in self._recording:
            layer.S.grad = None
            layer.gradient.clear()

    def __getstate__(self) -> None:
        raise TypeError(
            "a DLRT belongs to its model: copy the model, make a new DLRT and load its state_dict"
        )

    def freeze_bases(self) -> None:
        """From now on train S and the rest only: U and V stay, and the layers record nothing."""
        self.truncate()
        for layer in self._recording:
            layer.gradient.stop()

    @property
    def _recording(self) -> list[LowRankLayer]:
        return [layer for layer in self.names if layer.gradient is not None]

    def _layers_to_move(self) -> list[LowRankLayer]:
        layers = [layer for layer in self._recording if layer.S.grad is not None]  # the others took no part
        for layer in layers:
            if layer.gradient.empty and not layer.gradient.paused:
                raise RuntimeError(
                    f"{self.names[layer]} has a gradient but recorded nothing (in eval mode no layer does): "
                    "call model.train() before it, or freeze_bases() to train S only"
                )
            if world_size() > 1 and not layer.gradient.summed:
                raise RuntimeError(
                    f"{self.names[layer]} knows this process's gradient only: call "
                    "dlrt.distributed.reduce_gradients(model) between the backward pass and the step"
                )
        self._check_finite(layers)
        return layers

    def _check_finite(self, layers: list[LowRankLayer]) -> None:
        for layer in layers:
            if not layer.S.grad.isfinite().all():
                raise FloatingPointError(f"the gradient of {self.names[layer]} is not finite")

    @in_full_precision
    def _integrate(self, layers: list[LowRankLayer]) -> None:
        """K-, L- and S-step, or one more S-step in the bases of the last move; truncation where it is due."""
        added = {layer: self._augment(layer) for layer in layers if not layer.gradient.paused}
        self._sum_new_blocks(added)
        self.inner.step()
        for layer in layers:
            layer.S.grad = None  # it has done its work, and truncation refuses one that has not
        self._taken += 1
        if self._taken < self.s_steps:
            for layer, (U1, V1) in added.items():
                layer.factors = LowRank(torch.cat([layer.U, U1], 1), layer.S, torch.cat([layer.V, V1], 1))
                layer.gradient.paused = True
            return
        for layer, (U1, V1) in added.items():
            self._truncate_layer((layer.U, U1), layer, (layer.V, V1))
        self.truncate()

    @torch.no_grad()
    @in_full_precision
    def truncate(self) -> None:
        """Truncate now, before the last of `s_steps`, for an evaluation in between. Then the bases move."""
        for layer in self._recording:
            if layer.gradient.paused:
                if layer.S.grad is not None:
                    raise RuntimeError(
                        f"{self.names[layer]} has a gradient for the bases that truncation replaces: "
                        "call step() or zero_grad() first"
                    )
                self._truncate_layer((layer.U,), layer, (layer.V,))
                layer.gradient.paused = False
        self._taken = 0

    def _truncate_layer(
        self, U_hat: tuple[Tensor, ...], layer: LowRankLayer, V_hat: tuple[Tensor, ...]
    ) -> None:
        min_rank, max_rank = min(self.min_rank, *layer.shape), self.max_rank
        if max_rank == "initial":
            max_rank = self._initial_ranks[layer]
            min_rank = min(min_rank, max_rank)
        elif max_rank is not None:
            max_rank = max(min_rank, max_rank)
        try:
            layer.factors, P, Q = recompress(U_hat, layer.S, V_hat, self.tau, min_rank, max_rank)
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"the SVD of S fails in {self.names[layer]}: {error}") from error
        change_basis(self.state.get(layer.S, {}), P, Q)

    def _augment(self, layer: LowRankLayer) -> tuple[Tensor, Tensor]:
        """K- and L-step: directions to add to the bases; S and its gradient as they read in larger bases.

        The integrators add h F; here F = -G, and the minus sign is the inner optimizer's.
        """
        S, G, state = layer.S, layer.gradient, self.state.get(layer.S, {})
        matrices = [value for value in state.values() if isinstance(value, Tensor) and value.dim() == 2]
        if any(value.shape != S.shape for value in matrices):
            raise RuntimeError(
                f"{self.names[layer]} has a new rank: load the optimizer's state with the model's"
            )
        U1, V1, D = augment(layer.factors, G, self.integrator == "augmented", old_block=S.grad)
        D = G.scale * D
        k, l = S.shape  # noqa: E741
        D[:k, :l] = S.grad  # scaled already, and with the gradient of a penalty on S, if any
        identity = torch.eye(max(D.shape), device=D.device, dtype=D.dtype)
        change_basis(state, identity[:k, : D.shape[0]], identity[:l, : D.shape[1]])
        replace_data(S, pad_like(S, D))
        S.grad = D
        return U1, V1

    def _sum_new_blocks(self, added: dict[LowRankLayer, tuple[Tensor, Tensor]]) -> None:
        """The blocks U1ᵀ G V1 are this process's parts, the others come of products summed already."""
        if self.integrator == "augmented":
            sum_over_processes(
                layer.S.grad[-U1.shape[1] :, -V1.shape[1] :]
                for layer, (U1, V1) in added.items()
                if U1.numel() and V1.numel()
            )

    @in_full_precision
    def _move_bases(self, layer: LowRankLayer) -> None:
        """K- and L-step of the unconventional integrator, with plain gradient steps of size lr."""
        Y, G = layer.factors, layer.gradient
        Y1 = move_bases(Y, G @ Y.V, G.T @ Y.U, -self._learning_rate(layer.S) * G.scale)
        P, Q = Y.U.mT @ Y1.U, Y.V.mT @ Y1.V  # before the layer's parameters, which Y holds, move
        layer.factors = Y1
        change_basis(self.state.get(layer.S, {}), P, Q)

    def _learning_rate(self, parameter: Tensor) -> float | Tensor:
        return next(
            group["lr"] for group in self.param_groups if any(p is parameter for p in group["params"])
        )

    def state_dict(self) -> dict:
        """The inner optimizer's state, tau and the ranks in which the state of S is written."""
        ranks = [list(layer.S.shape) for layer in self.names]
        paused = [layer.gradient is not None and layer.gradient.paused for layer in self.names]
        own = {"tau": self.tau, "ranks": ranks, "taken": self._taken, "paused": paused}
        own["initial_ranks"] = list(self._initial_ranks.values())
        return {**self.inner.state_dict(), "dlrt": own}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a DLRT's state; ValueError unless the model has its own, with its ranks, already."""
        if "dlrt" not in state_dict:
            raise ValueError(
                f"the state must be a DLRT's, got one without its part, with {', '.join(state_dict)}: "
                "load it into that optimizer, or begin a new DLRT without it"
            )
        state_dict = dict(state_dict)
        own = state_dict.pop("dlrt")
        ranks = [list(layer.S.shape) for layer in self.names]
        if own["ranks"] != ranks:
            raise ValueError(
                f"the state has ranks {own['ranks']}, the model has {ranks}: load the model's state first"
            )
        self.inner.load_state_dict(state_dict)
        self.tau, self._taken = own["tau"], own.get("taken", 0)
        initial = own.get("initial_ranks", self._initial_ranks.values())
        self._initial_ranks = dict(zip(self.names, initial, strict=True))
        for layer, paused in zip(self.names, own.get("paused", [False] * len(ranks)), strict=True):
            if layer.gradient is not None:
                layer.gradient.paused = paused
        self._share_state()


def change_basis(state: dict, P: Tensor, Q: Tensor) -> None:
    """Write an inner optimizer's state for S in the bases U P and V Q, for P (k, k1) and Q (l, l1).

    An average M of gradients becomes Pᵀ M Q, as S itself. An average of squares becomes (P∘P)ᵀ M (Q∘Q),
    which is exact for entries without mean and correlation; where the mean is known (centred RMSprop), its
    square is set aside before. Either way augmentation pads with zeros, and exchanging or mirroring basis
    vectors is exact. In Adam a direction without a past moves by up to (1 - beta1) / sqrt(1 - beta2) lr at
    once, 3.2 lr by default.
    """
    mean = state.get("grad_avg")
    for name, value in state.items():
        if name in SQUARED_STATE:
            variance = value if mean is None else value - mean.square()
            state[name] = P.square().mT @ variance.to(P.dtype) @ Q.square()
    for name, value in state.items():
        if name in LINEAR_STATE and value is not None:
            state[name] = P.mT @ value.to(P.dtype) @ Q
    if mean is not None:
        state["square_avg"] += state["grad_avg"].square()


def _check_state_names(optimizer_class: type[torch.optim.Optimizer], inner: dict) -> None:
    """Refuse an inner optimizer that keeps a matrix for S that is not known to follow a basis."""
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros(2, 2)
    optimizer = optimizer_class([probe], **inner)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:  # LBFGS needs a closure, SparseAdam sparse gradients
        raise ValueError(f"{optimizer_class.__name__} cannot be the inner optimizer: {error}") from error
    matrices = {
        name
        for name, value in optimizer.state[probe].items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    if unknown := matrices - LINEAR_STATE - SQUARED_STATE:
        raise ValueError(
            f"{optimizer_class.__name__} keeps {', '.join(sorted(unknown))} for S, and how that follows a "
            "change of basis is not known; use one such as SGD, Adam, AdamW, RMSprop, Adagrad"
        )
