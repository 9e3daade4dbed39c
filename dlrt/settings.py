"""The settings of a DLRT: which layers it trains, what their parameter group holds, what is impossible."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlrt.checks import (
    check_compression,
    check_factors,
    check_orthonormal,
    check_rank_bounds,
    check_tolerance,
)
from dlrt.layers import LowRankLayer
from dlrt.velocity import RULES

INTEGRATORS = ("parallel", "augmented", "bug")
UPDATES = tuple(RULES)
UPDATE_OF = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adam"}
MUON_LR = 0.3  # its step size as a share of lr


def update_for(optimizer_class: type[torch.optim.Optimizer]) -> str | None:
    """The update rule of a torch class, if it has one."""
    return next((name for kind, name in UPDATE_OF.items() if issubclass(optimizer_class, kind)), None)


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


def low_rank_group(defaults: dict[str, Any], update: str, update_lr: float | None) -> dict[str, Any]:
    """The settings for low-rank weights, from those of the torch class; ValueError where they have no law."""
    if defaults.get("dampening") or defaults.get("amsgrad"):
        raise ValueError("dampening and amsgrad have no low-rank form here: leave them out")
    share = MUON_LR if update == "muon" else 1.0
    if update_lr is not None:
        share = update_lr / defaults["lr"]
    decoupled = update == "muon" or defaults.get("decoupled_weight_decay", False)
    if not {"momentum", "betas"} & defaults.keys():
        raise ValueError("the torch class must have momentum or betas: use SGD, Adam or AdamW")
    betas = {} if "momentum" in defaults else {"betas": defaults["betas"]}
    if update == "adam" and not betas:
        raise ValueError('update="adam" takes its betas from torch.optim.Adam or AdamW: use one of them')
    common = {"nesterov": False, "maximize": False, "weight_decay": 0.0}
    common |= {name: defaults[name] for name in common if name in defaults}
    return {"update": update, "update_share": share, "decoupled": decoupled, **common, **betas}


def check_integration(
    update: str | None,
    integrator: str,
    s_steps: int,
    tau: float,
    min_rank: int,
    max_rank: int | str | None,
    compression: float | None,
    ramp: int | None,
    allot_every: int,
) -> None:
    """Raise ValueError for options of `DLRT` that are impossible, or impossible together."""
    if update not in UPDATES:
        raise ValueError(
            f"update must be one of {', '.join(UPDATES)} (SGD, Adam and AdamW have their own), got {update!r}"
        )
    if integrator not in INTEGRATORS:
        raise ValueError(f"integrator must be one of {', '.join(INTEGRATORS)}, got {integrator!r}")
    if integrator == "bug" and (update != "sgd" or compression is not None):
        raise ValueError('integrator="bug" keeps ranks and steps by update="sgd": take another for the rest')
    for name, steps in (("s_steps", s_steps), ("allot_every", allot_every)):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {steps!r}")
    if s_steps > 1 and integrator != "parallel":
        raise ValueError(f's_steps > 1 needs integrator="parallel", got {integrator!r}: leave s_steps out')
    check_tolerance(tau)
    if isinstance(max_rank, str) and max_rank != "initial":
        raise ValueError(f'max_rank must be a whole number, "initial" or None, got {max_rank!r}')
    check_rank_bounds(min_rank, None if max_rank == "initial" else max_rank)
    check_compression(compression)
    if (compression is None) != (ramp is None):
        raise ValueError(f"compression and ramp come together, got {compression} and {ramp}: give both")
    if ramp is not None and (not isinstance(ramp, int) or isinstance(ramp, bool) or ramp < 0):
        raise ValueError(
            f"ramp must be a whole number, the steps over which the budget falls, got {ramp!r}: count them"
        )
