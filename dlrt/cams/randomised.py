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

from dlrt.cams.compare import pearson
from dlrt.cams.explain import explain
from dlrt.cams.targets import Target
from dlrt.layers import LowRankLayer
from dlrt.lowrank import qr


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weight matrices, kernels and embeddings that are a module's own."""
    return [p for p in module.parameters(recurse=False) if p.dim() > 1]


def weighted_modules(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """The modules with weights of their own, in the order in which they are called first.

    One that is read and not called, as the last layer of nn.MultiheadAttention, comes after the module that
    contains it.
    """
    order: dict[nn.Module, None] = {}
    hooks = [
        m.register_forward_pre_hook(lambda module, *_: order.setdefault(module)) for m in model.modules()
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    called = set(order)
    inner = (
        part for module in order for part in (module, *(m for m in module.children() if m not in called))
    )
    return [module for module in dict.fromkeys(inner) if matrices(module)]


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module random weights of the same norms, so that the statistics of norms behind it still fit.

    Of a low-rank layer the bases become random, and S: W keeps its rank.
    """
    for p in matrices(module):
        drawn = torch.randn(p.shape, generator=generator).to(p)
        basis = isinstance(module, LowRankLayer) and p is not module.S
        p.copy_(qr(drawn)[0] if basis else drawn * (p.norm() / drawn.norm()))


def cascade(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[Sequence[Target]],
    method: str,
    layer: str,
    steps: int,
    seed: int,
) -> Iterator[tuple[float, str, np.ndarray]]:
    """Randomise a copy in so many steps, at most one for each module, from the last to the first.

    Gives for each step the share of modules that are random by now, the name of the last one, and for each
    picture Pearson's correlation of the raw map with that of the model, NaN where it is not defined; first
    those of no random module.
    """
    own, copy = explain(model, images, targets, method, layer).raw, deepcopy(model)
    names = {module: name or type(module).__name__ for name, module in copy.named_modules()}
    modules = weighted_modules(copy, images[:1])[::-1]
    generator = torch.Generator().manual_seed(seed)
    ends = np.linspace(0, len(modules), min(steps, len(modules)) + 1).round().astype(int)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        for module in modules[start:end]:
            randomise(module, generator)
        raw = explain(copy, images, targets, method, layer).raw
        yield end / len(modules), names[modules[end - 1]] if end else "", pearson(own, raw)
