"""Averages of low-rank models: of their dense weights, since factors of different bases have no mean."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from dlrt.convert import to_dense


@torch.no_grad()
def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """The mean of models of one kind, a dense copy; ranks may differ. weights, which sum to 1, weigh them.

    `to_low_rank` makes it low-rank again. An exponential average is `average([mean, model], [d, 1 - d])`.
    Buffers are averaged where they are floating-point numbers. ValueError where there is nothing to
    average, and for models of different kinds.
    """
    if not models or (weights is not None and len(weights) != len(models)):
        raise ValueError(f"an average takes models, and a weight for each, got {len(models)} and {weights}")
    if weights is not None and not abs(sum(weights) - 1) <= 1e-6:
        raise ValueError(f"weights must sum to 1, got {sum(weights):g}: divide them by their sum")
    weights = weights or [1 / len(models)] * len(models)
    copies = [to_dense(deepcopy(model)) for model in models]
    states = [copy.state_dict() for copy in copies]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise ValueError("an average takes models of one kind, got models of different layers or shapes")
    mean = {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    copies[0].load_state_dict(mean, strict=False)  # buffers of whole numbers stay
    return copies[0]
