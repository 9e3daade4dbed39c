"""A run that broke off goes on: its last checkpoint into network, optimizer, schedule and loss scale."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dlrt import distributed
from dlrt.checkpoint import Row
from dlrt.errors import RunError
from dlrt.runs import Run, chosen_epoch

# what loading raises where a state is damaged or of another network
MISMATCHES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def of_another_network(run: Run) -> RunError:
    return RunError(f"{run.checkpoint} is of another network, or of another way to train it: move it away")


def continued(parts: dict[str, Any], run: Run) -> tuple[list[Row], dict[str, Tensor]]:
    """Give the parts their states of the last checkpoint; its rows and chosen weights, or none of either."""
    state = distributed.on_first_process(run.load)
    if state is None:
        return [], {}
    try:
        chosen_epoch(pd.DataFrame(state["metrics"]))
        parts["model"].load_state_dict(state["chosen"])  # as at the end
        for name, part in parts.items():
            begun, saved = part.state_dict(), state.get(name, {})  # older checkpoints have no scaler
            if begun and not begun.keys() & dict(saved).keys():
                raise ValueError(f"there is no {name}")
            part.load_state_dict(saved)
            _check_form(begun, part.state_dict(), name)
        _check_shapes(parts["optimizer"])
    except MISMATCHES as error:
        raise of_another_network(run) from error
    return state["metrics"], state["chosen"]


def _check_form(begun: Any, loaded: Any, name: str) -> None:
    """ValueError where a state lacks what it began with, or has it in another type."""
    if isinstance(begun, dict | list | tuple) and isinstance(loaded, type(begun)):
        parts = begun if isinstance(begun, dict) else range(len(begun))
        for part in parts:
            _check_form(begun[part], loaded[part], f"{name}, {part}")
    elif not isinstance(loaded, int | float if isinstance(begun, int | float) else type(begun)):
        raise ValueError(f"{name} must be of {type(begun).__name__}, got {loaded!r}")


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """ValueError where the state of a parameter is no tensors of its shape, or numbers."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = value.shape if isinstance(value, Tensor) else None
            if shape not in ((), parameter.shape) and not isinstance(value, int):
                raise ValueError(f"{name} must have the shape {tuple(parameter.shape)}, got {value!r}")
