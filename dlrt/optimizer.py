"""DLRT: an optimizer that moves low-rank weights by an integrator, and all else by a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlrt.checks import check_orthonormal, check_tolerance
from dlrt.costs import budget_between
from dlrt.distributed import checksum, remember_sums
from dlrt.layers import LowRankLayer
from dlrt.network_step import NetworkStep
from dlrt.ranks import falling_budget
from dlrt.settings import Settings, low_rank_layers
from dlrt.step_checks import check_finite, check_layers, check_no_gradient_waits, check_owner


class DLRT(torch.optim.Optimizer):
    """Train a model with low-rank layers: one `step()` after one ordinary forward and backward pass.

        optimizer = DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.1)

    `optimizer_class` (SGD, Adam, AdamW), made with `**options`, steps biases, norms and dense layers. A
    low-rank weight moves by an integrator along its velocity, a tangent vector. A layer belongs to the last
    DLRT that was made of it. ValueError for an impossible option and for bases that are not orthonormal.

    How a weight steps:

    - update: the rule on the small matrix D, "sgd", "adam" or "muon"; by default that of the class. "sgd"
      moves by update_lr D and at full rank is torch's SGD; "muon" moves by update_lr √max(1, m/n) msign(D),
      with decoupled weight decay, and at full rank is Muon.
    - update_lr: the step size of low-rank weights, by default lr, or 0.3 lr of "muon". Schedulers change
      it in proportion to lr.
    - integrator: "parallel" takes one pass a step (Ceruti, Kusch & Lubich 2024). "augmented" updates the
      bases by one pass and S by another (Ceruti, Kusch & Lubich 2022; Schotthöfer et al. 2022), and so
      does "bug", which keeps the rank (Ceruti & Lubich 2022); both call `step(closure)`, which
      evaluates the closure twice.
    - s_steps: the bases are updated in every s_steps-th step, and S in between, in the augmented bases, of
      up to twice the rank; `truncate()` cuts them at once, to evaluate or to save.

    Which ranks it has (the smallest that is asked for wins):

    - tau: the share of ‖S‖ that is truncated where ranks are decided, an attribute that may change; by
      default 0.1, or 0 under a budget.
    - compression: a fraction, the budget for the parameters of the whole model. All directions of all
      layers compete for it by their share of their layer, for r (m + n).
    - cut_by: what a budget keeps of each layer, "loss": what the loss needs, by second moments of the
      gradient (`dlrt.moments`), or "weights": the largest singular values, as before ten gradients are
      known.
    - ramp: steps over which the budget falls from the present ranks to compression, along a cubic.
    - allot_every: ranks are decided in every so many steps, at an update of the bases, and constant in
      between.
    - min_rank, max_rank: bounds for each layer; max_rank="initial" is the rank that it has now.
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
        cut_by: str = "loss",
        allot_every: int = 10,
        integrator: str = "parallel",
        min_rank: int = 2,
        max_rank: int | Literal["initial"] | None = None,
        s_steps: int = 1,
        **options: Any,
    ) -> None:
        names = low_rank_layers(model)
        settings = Settings(
            optimizer_class,
            update=update,
            update_lr=update_lr,
            tau=tau,
            compression=compression,
            ramp=ramp,
            cut_by=cut_by,
            allot_every=allot_every,
            integrator=integrator,
            min_rank=min_rank,
            max_rank=max_rank,
            s_steps=s_steps,
        )
        self.layers = {layer: name for layer, name in names.items() if layer.S.requires_grad}
        if not self.layers:
            raise ValueError("a low-rank layer must be trainable, got frozen ones alone: unfreeze an S")
        factors = {id(factor) for layer in names for factor in (layer.U, layer.S, layer.V)}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
        self.inner = optimizer_class([{"params": rest}], **options)
        group = settings.group(self.inner.defaults, list(self.layers))
        if compression is not None:
            least = [min(min_rank, most) for most in group["max_ranks"]]
            group["budget"] = *budget_between(model, self.layers, compression, least), ramp
        group["params"] = [factor for layer in self.layers for factor in (layer.U, layer.S, layer.V)]
        super().__init__([*self.inner.param_groups, group], self.inner.defaults)
        self.inner.state = self.state
        for layer in names:
            rows, columns = layer.S.shape  # differ where another DLRT has yet to truncate: bases rest
            layer.trains_bases = layer in self.layers and rows == columns
        self._bases_before: dict[LowRankLayer, tuple[Tensor, Tensor]] = {}  # of velocities that are to follow
        self._awaited: set[LowRankLayer] = set()  # whose state was loaded, and whose factors are to follow
        for layer in self.layers:
            layer.belong_to(self)

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group of all factors, with the settings and the progress of their integrator."""
        return next(group for group in self.param_groups if "update" in group)

    @property
    def _network_step(self) -> NetworkStep:
        """Made anew each time, since a state that is loaded replaces both."""
        return NetworkStep(self.layers, self.state, self.group)

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
        check_owner(self.layers, self)
        self._carry_velocities()
        integrator = self.group["integrator"]
        two_passes = integrator != "parallel" and not self.group["frozen"]
        if two_passes and closure is None:
            raise RuntimeError(
                f'integrator="{integrator}" takes two passes a step: call step(closure), as with LBFGS'
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = self._layers_with_gradient()
        if two_passes and layers:
            with _full_precision(self.layers):
                self._network_step.update_bases(layers)
            self.zero_grad()  # those gradients belong to other bases
            with torch.enable_grad():
                closure()
            layers = self._layers_with_gradient()
        self.inner.param_groups = [group for group in self.param_groups if "update" not in group]
        self.inner.step()
        with _full_precision(self.layers):
            self._network_step.move(layers, s_step_alone=two_passes)
        return loss

    def _layers_with_gradient(self) -> list[LowRankLayer]:
        """The layers that take part in a step; an error where it would go wrong."""
        check_layers(self.layers, self.state, self._network_step.decides_next)
        check_finite(self.layers, self.param_groups)
        layers = [layer for layer in self.layers if layer.S.grad is not None]
        remember_sums(layer.S for layer in layers)
        return layers

    @torch.no_grad()
    def truncate(self) -> None:
        """Truncate by tau now, to evaluate between two decisions, or before the last of `s_steps`.

        Under a budget ranks are those of its last decision, or of one that is due. RuntimeError where a
        gradient for the present bases still waits for its step.
        """
        self._check_truncation()
        if not self.group["frozen"]:
            with _full_precision(self.layers):
                self._network_step.truncate()

    @torch.no_grad()
    def freeze_bases(self) -> None:
        """From now on train S and the rest only: U, V and the ranks stay. A budget is met before.

        RuntimeError as of `truncate`.
        """
        self._check_truncation()
        if not self.group["frozen"]:
            with _full_precision(self.layers):
                self._network_step.freeze()

    def _check_truncation(self) -> None:
        check_owner(self.layers, self)
        self._carry_velocities()
        if not self.group["frozen"]:
            check_no_gradient_waits(self.layers)

    def remember_bases(self, layer: LowRankLayer, shape: tuple[int, int]) -> None:
        """Keep the bases of a layer into which others are about to be written: its velocity is theirs.

        Not where these are the factors that a state, loaded before, belongs to. Its bases train from now on,
        but rest where S is to have another shape than (r, r), and where they are frozen.
        """
        if layer in self._awaited:
            self._awaited.remove(layer)
            return
        past = self.state.get(layer.S, {})
        if past.keys() & {"velocity", "squares", "left"}:
            self._bases_before.setdefault(layer, (layer.U.detach().clone(), layer.V.detach().clone()))
        if not self.group["frozen"]:
            past.pop("rank", None)
            layer.trains_bases = shape[0] == shape[1]

    @torch.no_grad()
    def _carry_velocities(self) -> None:
        """As a dense optimizer keeps its momentum where weights are loaded: by projection to their bases."""
        self._awaited.clear()
        for layer in list(self._bases_before):
            self._network_step.weight(layer).carry_from(*self._bases_before[layer])
            del self._bases_before[layer]

    def __getstate__(self) -> None:
        raise TypeError(
            "a DLRT belongs to its model: copy the model, make a new DLRT and load its state_dict"
        )

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; the factors' group has the ranks and the progress of the integrator."""
        if not self._awaited:
            self._carry_velocities()
        self.group["bases"] = self._checksums()
        self.group["ranks"] = [list(layer.S.shape) for layer in self.layers]
        self.group["resting"] = [not layer.trains_bases for layer in self.layers]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a DLRT's state; ValueError unless the model has its own, with its ranks, already."""
        own = next((group for group in state_dict["param_groups"] if "update" in group), None)
        if own is None:
            raise ValueError(
                "the state must be a DLRT's, got one without low-rank layers: load it into that optimizer, "
                "or begin a new DLRT without it"
            )
        ranks = [list(layer.S.shape) for layer in self.layers]
        if own["ranks"] != ranks:
            raise ValueError(
                f"the state has ranks {own['ranks']}, the model has {ranks}: load the model's state first"
            )
        if ("betas" in own) != ("betas" in self.group):
            kinds = ["SGD", "Adam or AdamW"][:: 1 if "betas" in own else -1]
            raise ValueError(
                f"the state must be of a DLRT with {kinds[0]}, got one with {kinds[1]}: make one with that"
            )
        super().load_state_dict(state_dict)
        self._bases_before.clear()
        there = zip(self.layers, self._checksums(), own.get("bases", [None] * len(ranks)), strict=True)
        self._awaited = {layer for layer, bases, of_state in there if bases != of_state}
        self.inner.state = self.state
        for (layer, name), rests in zip(self.layers.items(), own["resting"], strict=True):
            check_orthonormal(name, layer.U, layer.V)
            layer.trains_bases = not rests

    def _checksums(self) -> list[list[int]]:
        """By which a state knows the bases that its velocity is in."""
        return [[checksum(layer.U), checksum(layer.V)] for layer in self.layers]


def _full_precision(layers: dict[LowRankLayer, str]) -> torch.autocast:
    """Autocast around a step would round what QR and SVD are made of."""
    return torch.autocast(next(iter(layers)).S.device.type, enabled=False)
