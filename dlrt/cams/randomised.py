"""Do maps depend on the weights? A network is randomised layer by layer, from its end to its beginning.

A map that stays what it was explains the picture or the architecture. Adebayo et al. 2018, cascading
randomisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from dlrt.cams.compare import similarity
from dlrt.cams.explain import explain
from dlrt.cams.targets import Target
from dlrt.hooks import watching
from dlrt.layers import LowRankLayer


def weighted_layers(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """The layers with a weight matrix or kernel, in the order in which they are called first."""
    order: dict[nn.Module, None] = {}
    layers = [m for m in model.modules() if hasattr(m, "reset_parameters") and _norm(m) is not None]
    with torch.no_grad(), watching(model, layers, lambda layer, *_: order.setdefault(layer)):
        model(images)
    return list(order)


def _norm(layer: nn.Module) -> Tensor | None:
    """‖W‖ (Frobenius) of a layer that has a matrix or a kernel W."""
    weight = layer.S if isinstance(layer, LowRankLayer) else getattr(layer, "weight", None)
    matrix = isinstance(weight, Tensor) and weight.dim() > 1
    return torch.linalg.vector_norm(weight.detach()) if matrix else None


@torch.no_grad()
def randomise(layer: nn.Module) -> None:
    """Give a layer random weights of the same norm, so that the statistics of norms behind it still fit."""
    norm = _norm(layer)
    layer.reset_parameters()
    (layer.S if isinstance(layer, LowRankLayer) else layer.weight).mul_(norm / _norm(layer))


def cascade(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[Sequence[Target]],
    method: str,
    layer: str,
    steps: int,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Randomise a copy in so many steps, at most one for each layer, from the last layer to the first.

    Gives for each step the name of the last layer that is random by now, and for each picture Pearson's
    correlation of the raw map with that of the model, NaN where it is not defined; first "", for none.
    """
    own, copy = explain(model, images, targets, method, layer).raw, deepcopy(model)
    names = {module: name for name, module in copy.named_modules()}
    layers = weighted_layers(copy, images[:1])[::-1]
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(20_221_128 + seed)  # of none of the seeds with which networks begin
    drawn = torch.random.get_rng_state()
    ends = np.linspace(0, len(layers), min(steps, len(layers)) + 1).round().astype(int)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        torch.random.set_rng_state(drawn)
        for module in layers[start:end]:
            randomise(module)
        drawn = torch.random.get_rng_state()
        torch.random.set_rng_state(generator_state)
        raw = explain(copy, images, targets, method, layer).raw
        r = [similarity(a, b)["pearson"] for a, b in zip(own, raw, strict=True)]
        yield names[layers[end - 1]] if end else "", np.array(r)
