"""The layers of a network that give feature maps, which can be explained."""

from __future__ import annotations

import contextlib
from math import log
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrt.convolutions import LowRankConv2d
from dlrt.layers import LowRankLinear
from dlrt.watching import watching

Shape = tuple[int, ...]


class FeatureMaps(NamedTuple):
    """What a module gives: feature maps (N, C, height, width), or channels-last (N, height, width, C)."""

    module: nn.Module
    size: tuple[int, int]
    channels_last: bool


def spatial_layers(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """The modules that can be explained on an image (1, C, H, W), by name, in the order in which they end.

    Those that are called once and give feature maps of more than one pixel, with (height, width).
    """
    return {name: maps.size for name, maps in feature_maps(model, image).items()}


def default_layer(model: nn.Module, image: Tensor) -> str:
    """The name of the module that gives the output of the last convolutional block.

    The last one to end, of those at or after the last convolution whose output is as large as that of the
    convolution; a linear layer on channels-last maps is one. ValueError where there is none.
    """
    layers = list(feature_maps(model, image).items())
    last = max((number for number, (_, maps) in enumerate(layers) if _convolves(maps)), default=-1)
    if last < 0:
        raise ValueError(f"{type(model).__name__} has no convolution with an output larger than one pixel")
    return [name for name, maps in layers[last:] if maps.size == layers[last][1].size][-1]


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, FeatureMaps]:
    """The modules that are called once and give feature maps of more than one pixel, by name.

    Their layout shows on a picture of twice the height: the size that changes with it is the height of the
    maps. Where the network takes no other picture, maps are taken to have the proportions of the picture.
    """
    names = {module: name for name, module in model.named_modules() if name}
    pair = image.repeat(2, 1, 1, 1)  # tables of positions and the like have not the size of the batch
    calls: dict[nn.Module, list[Shape]] = {}
    of_tall: dict[nn.Module, list[Shape]] = {}
    _watch(model, pair, calls)
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):
        _watch(model, pair.repeat(1, 1, 2, 1), of_tall)
    found = {}
    for module, shapes in calls.items():
        shape = shapes[0]
        if module is model or len(shapes) > 1 or len(shape) != 4 or len(pair) != shape[0]:
            continue
        if module in of_tall:
            last = shape[1] != of_tall[module][0][1]
        else:
            last = _apart(shape[1:3], image) < _apart(shape[2:], image)
        size = shape[1:3] if last else shape[2:]
        if size != (1, 1):
            found[names[module]] = FeatureMaps(module, size, last)
    return found


def _convolves(maps: FeatureMaps) -> bool:
    linear = maps.channels_last and isinstance(maps.module, (nn.Linear, LowRankLinear))
    return linear or isinstance(maps.module, (nn.Conv2d, LowRankConv2d))


def _watch(model: nn.Module, images: Tensor, calls: dict[nn.Module, list[Shape]]) -> None:
    """Note the shapes of what every module gives, in the order in which they end; () for no tensor."""

    def watch(module: nn.Module, _: tuple[Tensor, ...], y: object) -> None:
        calls.setdefault(module, []).append(tuple(y.shape) if isinstance(y, Tensor) else ())

    with torch.no_grad(), watching(model, model.modules(), watch):
        model(images)


def _apart(size: Shape, image: Tensor) -> float:
    """How far a size (height, width) is from the proportions of an image."""
    return abs(log(size[0] * image.shape[3] / (size[1] * image.shape[2])))
