"""The layers of a network that give feature maps, which can be explained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrt.convolutions import LowRankConv2d
from dlrt.watching import watching


def spatial_layers(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """The modules that can be explained on an image (1, C, H, W), by name, in the order in which they end.

    Those that are called once and give feature maps of more than one pixel, with (height, width).
    """
    return {name: size for name, size, _ in _called_once(model, image)}


def default_layer(model: nn.Module, image: Tensor) -> str:
    """The name of the module that gives the output of the last convolutional block.

    The last one to end, of those at or after the last convolution whose output is as large as that of the
    convolution. ValueError where there is none.
    """
    layers = _called_once(model, image)
    kinds = (nn.Conv2d, LowRankConv2d)
    last = max(
        (number for number, (_, _, module) in enumerate(layers) if isinstance(module, kinds)), default=-1
    )
    if last < 0:
        raise ValueError(f"{type(model).__name__} has no convolution with an output larger than one pixel")
    return [name for name, size, _ in layers[last:] if size == layers[last][1]][-1]


def _called_once(model: nn.Module, image: Tensor) -> list[tuple[str, tuple[int, int], nn.Module]]:
    calls: list[tuple[str, object, nn.Module]] = []
    paths = {module: path for path, module in model.named_modules() if path}

    def watch(module: nn.Module, _: tuple[Tensor, ...], y: object) -> None:
        calls.append((paths[module], y, module))

    with torch.no_grad(), watching(model, paths, watch):
        model(image)
    names = [name for name, _, _ in calls]
    return [
        (name, tuple(y.shape[2:]), module)
        for name, y, module in calls
        if names.count(name) == 1 and isinstance(y, Tensor) and y.dim() == 4 and y[0, 0].numel() > 1
    ]
