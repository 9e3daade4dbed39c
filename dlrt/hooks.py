"""Watch the layers of a network while it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def watching(model: nn.Module, layers: Iterable[nn.Module], watch: Callable) -> Iterator[None]:
    """Inside, the model is in evaluation mode, and watch(layer, its inputs, its outputs) sees every call.

    Afterwards every module is in the mode that it was in.
    """
    handles = [layer.register_forward_hook(watch) for layer in layers]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
