"""The settings of a DLRT: which layers it trains, what their parameter group holds, what is impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlrt.checks import (
    check_compression,
    check_factors,
    check_number,
    check_orthonormal,
    check_rank_bounds,
    check_tolerance,
    check_whole,
)
from dlrt.layers import LowRankLayer
from dlrt.velocity import UPDATES, rule_of, update_share

CUT_BY = ("loss", "weights")
INTEGRATORS = ("parallel", "augmented", "bug")
UPDATE_OF = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adam"}


def low_rank_layers(model: nn.Module) -> dict[LowRankLayer, str]:
    """The model's low-rank layers and their names; an error where DLRT cannot train them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument must be the model itself, not {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("make the DLRT of the model first, and wrap it in DistributedDataParallel then")
    names = {
        module: name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, LowRankLayer)
    }
    if not names:
        raise ValueError(
            "the model has no low-rank layer: call dlrt.to_low_rank(model) first, and skip fewer layers"
        )
    for layer, name in names.items():
        check_factors(name, layer.S)
        check_orthonormal(name, layer.U, layer.V)
    return names


@dataclass
class Settings:
    """How a `DLRT` treats low-rank weights. ValueError for what is impossible, alone or together."""

    optimizer_class: type[torch.optim.Optimizer]
    update: str | None
    update_lr: float | None
    tau: float | None
    compression: float | None
    ramp: int | None
    cut_by: str
    allot_every: int
    integrator: str
    min_rank: int
    max_rank: int | str | None
    s_steps: int

    def __post_init__(self) -> None:
        kind = self.optimizer_class
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise TypeError(
                f"the second argument must be a class as torch.optim.SGD, which steps the rest, got {kind!r}"
            )
        if self.update is None:
            self.update = next((name for base, name in UPDATE_OF.items() if issubclass(kind, base)), None)
        if self.update is None:
            raise ValueError(f"update must be given for {kind.__name__}, one of {', '.join(UPDATES)}")
        if self.update not in UPDATES:
            raise ValueError(
                f"update must be one of {', '.join(UPDATES)} (SGD, Adam and AdamW have their own), got "
                f"{self.update!r}"
            )
        if self.update_lr is not None:
            check_number("update_lr", self.update_lr)
        self._check_integrator()
        self._check_ranks()

    def _check_integrator(self) -> None:
        integrator = self.integrator
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator must be one of {', '.join(INTEGRATORS)}, got {integrator!r}")
        if integrator == "bug" and (self.update != "sgd" or self.compression is not None):
            raise ValueError(
                'integrator="bug" keeps ranks and steps by update="sgd": take another for the rest'
            )
        check_whole("s_steps", self.s_steps)
        if self.s_steps > 1 and integrator != "parallel":
            raise ValueError(
                f's_steps > 1 needs integrator="parallel", got {integrator!r}: leave s_steps out'
            )

    def _check_ranks(self) -> None:
        check_whole("allot_every", self.allot_every)
        check_tolerance(self.tau)
        if self.tau is None:
            self.tau = 0.1 if self.compression is None else 0.0
        if isinstance(self.max_rank, str) and self.max_rank != "initial":
            raise ValueError(f'max_rank must be a whole number, "initial" or None, got {self.max_rank!r}')
        check_rank_bounds(self.min_rank, None if self.max_rank == "initial" else self.max_rank)
        check_compression(self.compression)
        if (self.compression is None) != (self.ramp is None):
            raise ValueError(
                f"compression and ramp come together, got {self.compression} and {self.ramp}: give both"
            )
        if self.cut_by not in CUT_BY:
            raise ValueError(f"cut_by must be one of {', '.join(CUT_BY)}, got {self.cut_by!r}")
        if self.ramp is not None:
            check_whole("ramp", self.ramp, least=0)

    def group(self, defaults: dict[str, Any], layers: Sequence[LowRankLayer]) -> dict[str, Any]:
        """The parameter group of these layers, where a torch class with these defaults steps the rest.

        ValueError for options of the class that have no low-rank form.
        """
        for name in ("lr", "weight_decay", "momentum", "eps"):
            if not isinstance(defaults.get(name), torch.Tensor):
                check_number(name, defaults.get(name, 0.0))
        if defaults.get("dampening") or defaults.get("amsgrad"):
            raise ValueError("dampening and amsgrad have no low-rank form here: leave them out")
        if "momentum" not in defaults and "betas" not in defaults:
            raise ValueError("the torch class must have momentum or betas: use SGD, Adam or AdamW")
        if self.update == "adam" and "betas" not in defaults:
            raise ValueError('update="adam" takes its betas from torch.optim.Adam or AdamW: use one of them')
        if defaults.get("nesterov") and (self.integrator == "augmented" or self.s_steps > 1):
            raise ValueError(
                'integrator="augmented" and s_steps > 1 keep of the velocity what lies in augmented bases, '
                "less than Nesterov's step needs: leave nesterov out, or take neither"
            )
        rule = rule_of(self.update)
        share = update_share(rule, self.update_lr, defaults["lr"])
        by_loss = self.compression is not None and self.cut_by == "loss"
        most = {None: [min(layer.shape) for layer in layers], "initial": [layer.rank for layer in layers]}
        taken_over = ("nesterov", "maximize", "weight_decay", "momentum", "betas", "eps")
        return {
            **{"nesterov": False, "maximize": False, "weight_decay": 0.0},
            **{name: defaults[name] for name in taken_over if name in defaults},
            "update": self.update,
            "update_share": share,
            "decoupled": rule.decoupled or defaults.get("decoupled_weight_decay", False),
            "integrator": self.integrator,
            "tau": self.tau,
            "min_rank": self.min_rank,
            "cut_by": "loss" if by_loss else "weights",
            "max_ranks": most.get(self.max_rank) or [self.max_rank] * len(layers),
            "allot_every": self.allot_every,
            "s_steps": self.s_steps,
            "steps": 0,  # made, of the bases or of S alone
            "s_steps_taken": 0,  # since the bases were updated
            "allot_at": 0,  # the step that decides ranks next
            "frozen": False,
        }
