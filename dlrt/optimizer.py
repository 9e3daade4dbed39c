"""DLRT: an optimizer that moves bases by a low-rank integrator and all else by a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlrt.gradient import Gradient
from dlrt.integrators import augment, move_bases, pad_like, recompress
from dlrt.layers import LowRankLayer, replace_data
from dlrt.lowrank import LowRank, check_tolerance

INTEGRATORS = ("augmented", "parallel", "bug")
LINEAR_STATE = {"momentum_buffer", "exp_avg", "grad_avg", "ax"}  # averages of gradients or of S
SQUARED_STATE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}  # averages of squares


class DLRT(torch.optim.Optimizer):
    """Train a model with low-rank layers: one `step()` after one ordinary forward and backward pass.

        optimizer = DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.1)

    The inner optimizer (a torch.optim class; **inner are its arguments) steps every S, the biases, norms and
    dense layers in one call; its state for S follows the bases. tau is the share of ‖S‖ that each step may
    truncate; it is an attribute and may change between steps. Integrators, with h = lr:

    - "augmented": rank-adaptive BUG; Ceruti, Kusch & Lubich 2022, Schotthöfer et al. 2022, algorithm 1.
    - "parallel": the same without the new block of the S-step; keeps no samples. Ceruti, Kusch & Lubich 2024.
    - "bug": the unconventional integrator at fixed rank; Ceruti & Lubich 2022. Its S-step needs the gradient
      at other weights, hence `step(closure)`, which evaluates the closure twice.

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
        max_rank: int | None = None,
        **inner,
    ) -> None:
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator must be one of {', '.join(INTEGRATORS)}, got {integrator!r}")
        check_tolerance(tau)
        if min_rank < 1 or (max_rank is not None and max_rank < min_rank):
            raise ValueError(f"ranks must satisfy 1 ≤ min_rank ≤ max_rank, got {min_rank} and {max_rank}")
        _check_state_names(optimizer_class, inner)
        self.tau, self.integrator, self.min_rank, self.max_rank = tau, integrator, min_rank, max_rank
        self.names = {
            module: name for name, module in model.named_modules() if isinstance(module, LowRankLayer)
        }
        for layer in self.names:
            if layer.S.requires_grad:
                Gradient(layer, keep_samples=integrator == "augmented")
        self.inner = optimizer_class([p for p in model.parameters() if p.requires_grad], **inner)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share_state()

    def _share_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the integrator; gives the closure's loss, if there is a closure.

        RuntimeError where a layer has a gradient but nothing recorded, FloatingPointError where one is not
        finite; in both cases nothing has moved.
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
            with torch.enable_grad():
                closure()
            self.inner.step()
        else:
            directions = [self._augment(layer) for layer in layers]
            self.inner.step()
            for layer, (U1, V1) in zip(layers, directions, strict=True):
                self._truncate(layer, U1, V1)
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

    def freeze_bases(self) -> None:
        """From now on train S and the rest only: U and V stay, and the layers record nothing."""
        for layer in self._recording:
            layer.gradient.stop()

    @property
    def _recording(self) -> list[LowRankLayer]:
        return [layer for layer in self.names if layer.gradient is not None]

    def _layers_to_move(self) -> list[LowRankLayer]:
        layers = [layer for layer in self._recording if layer.S.grad is not None]  # the others took no part
        for layer in layers:
            if layer.gradient.empty:
                raise RuntimeError(
                    f"{self.names[layer]} has a gradient but recorded nothing (in eval mode no layer does): "
                    "call model.train() before it, or freeze_bases() to train S only"
                )
            if not layer.S.grad.isfinite().all():
                raise FloatingPointError(f"the gradient of {self.names[layer]} is not finite")
        return layers

    def _augment(self, layer: LowRankLayer) -> tuple[Tensor, Tensor]:
        """K- and L-step: directions to add to the bases; S and its gradient as they read in larger bases."""
        S, G = layer.S, layer.gradient
        U1, V1, D = augment(layer.factors, G, self.integrator == "augmented", old_block=S.grad)
        D = G.scale * D
        D[: len(S), : len(S)] = (
            S.grad
        )  # scaled already, and with the gradient of a penalty on S, if there is one
        identity = torch.eye(max(D.shape), device=D.device, dtype=D.dtype)[: len(S)]
        change_basis(self.state.get(S, {}), identity[:, : D.shape[0]], identity[:, : D.shape[1]])
        replace_data(S, pad_like(S, D))
        S.grad = D
        return U1, V1

    def _truncate(self, layer: LowRankLayer, U1: Tensor, V1: Tensor) -> None:
        min_rank = min(self.min_rank, *layer.shape)
        max_rank = None if self.max_rank is None else max(min_rank, self.max_rank)
        Y = LowRank(layer.U, layer.S[: layer.U.shape[1], : layer.V.shape[1]], layer.V)
        layer.factors, P, Q = recompress(Y, U1, V1, layer.S, self.tau, min_rank, max_rank)
        change_basis(self.state.get(layer.S, {}), P, Q)

    def _move_bases(self, layer: LowRankLayer) -> None:
        """K- and L-step of the unconventional integrator, with plain gradient steps of size lr."""
        Y, G = layer.factors, layer.gradient
        h = -self._learning_rate(layer.S) * G.scale
        Y1 = move_bases(Y, G @ Y.V, G.T @ Y.U, h)
        layer.factors = Y1
        change_basis(self.state.get(layer.S, {}), Y.U.mT @ Y1.U, Y.V.mT @ Y1.V)

    def _learning_rate(self, parameter: Tensor) -> float | Tensor:
        return next(
            group["lr"] for group in self.param_groups if any(p is parameter for p in group["params"])
        )

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; the group is the inner optimizer's."""
        super().add_param_group(param_group)

    def state_dict(self) -> dict:
        """The inner optimizer's state, tau and the ranks in which the state of S is written."""
        ranks = [list(layer.S.shape) for layer in self.names]
        return {**self.inner.state_dict(), "dlrt": {"tau": self.tau, "ranks": ranks}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state; the model's own, with its ranks, must be loaded first (else ValueError)."""
        state_dict = dict(state_dict)
        own = state_dict.pop("dlrt")
        ranks = [list(layer.S.shape) for layer in self.names]
        if own["ranks"] != ranks:
            raise ValueError(
                f"the state has ranks {own['ranks']}, the model has {ranks}: load the model's state first"
            )
        self.inner.load_state_dict(state_dict)
        self.tau = own["tau"]
        self._share_state()


def change_basis(state: dict, P: Tensor, Q: Tensor) -> None:
    """Write an inner optimizer's state for S in the bases U P and V Q, for P (k, k1) and Q (l, l1).

    An average M of gradients becomes Pᵀ M Q, as S itself; one of squares (P∘P)ᵀ M (Q∘Q), exact for entries
    without correlation. Either way augmentation pads with zeros, and exchanging or mirroring basis vectors is
    exact.
    """
    for name, value in state.items():
        if name in LINEAR_STATE and value is not None:
            state[name] = P.mT @ value @ Q
        elif name in SQUARED_STATE:
            state[name] = P.square().mT @ value @ Q.square()


def _check_state_names(optimizer_class: type[torch.optim.Optimizer], inner: dict) -> None:
    """Refuse an inner optimizer that keeps a matrix for S that is not known to follow a basis."""
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros(2, 2)
    optimizer = optimizer_class([probe], **inner)
    try:
        optimizer.step()
    except TypeError as error:  # LBFGS: step() needs a closure
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
