"""What must hold before a DLRT steps or truncates, or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlrt.checks import check_factors, check_orthonormal
from dlrt.layers import LowRankLayer

Names = Mapping[LowRankLayer, str]


def check_owner(layers: Names, optimizer: torch.optim.Optimizer) -> None:
    """RuntimeError where a layer is another DLRT's by now, or its factors are other parameters.

    Velocity and progress here are not its own then.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer, name in layers.items():
        owner = getattr(layer, "owner", None)
        if owner is None or owner() is not optimizer:
            raise RuntimeError(
                f"{name} must belong to the DLRT that steps, but was converted or given to a later DLRT: "
                "step that one, or make a new one"
            )
        if id(layer.S) not in own:
            check_factors(name, layer.S)  # a shard is told as one
            raise RuntimeError(
                f"{name} must have the parameters of which the DLRT was made, got others, as from "
                "load_state_dict(assign=True): leave assign out, or make a new DLRT"
            )


def check_layers(layers: Names, state: Mapping[Tensor, dict[str, Any]], decides: bool) -> None:
    """ValueError for factors that a step cannot take, RuntimeError for a velocity of another shape.

    Where ranks are decided the former are bases, too, that are not orthonormal.
    """
    for layer, name in layers.items():
        check_factors(name, layer.S)
        if decides:  # else somebody's clamped or averaged bases would go wrong in silence
            check_orthonormal(name, layer.U, layer.V)
        past = state[layer.S].get("velocity")
        if past is not None and past.shape != layer.S.shape:
            raise RuntimeError(
                f"{name} has a coefficient matrix of shape {tuple(layer.S.shape)}, its velocity "
                f"{tuple(past.shape)}: load the optimizer's state with the model's, or make a new DLRT"
            )


def check_finite(layers: Names, groups: Sequence[dict[str, Any]]) -> None:
    """FloatingPointError where a gradient of whatever is trained, or lr, is not a finite number."""
    for group in groups:
        if not math.isfinite(group["lr"]):
            raise FloatingPointError(f"lr must be finite, got {group['lr']}: look at the scheduler")
    trained = [p for group in groups for p in group["params"] if p.grad is not None]
    trained = [p for p in trained if p.grad.layout == torch.strided]
    # the norm is not finite where an entry is not, and takes a seventh of the time that isfinite() takes
    if torch.nn.utils.get_total_norm([p.grad for p in trained]).isfinite():
        return
    names = {p: name for layer, name in layers.items() for p in (layer.U, layer.S, layer.V)}
    for p in sorted(trained, key=lambda p: p not in names):
        if not p.grad.isfinite().all():
            name = names.get(p, f"a bias, norm or dense layer of shape {tuple(p.shape)}")
            raise FloatingPointError(f"the gradient of {name} is not finite")


def check_no_gradient_waits(layers: Names) -> None:
    """RuntimeError where a gradient for the present bases has not stepped."""
    for layer, name in layers.items():
        if layer.S.grad is not None:
            raise RuntimeError(
                f"{name} has a gradient for the bases that truncation replaces: call step() or zero_grad() "
                "first"
            )
