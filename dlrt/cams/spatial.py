"""The layers of a network that give feature maps, which can be explained."""

from __future__ import annotations

import contextlib
from math import log, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrt.convolutions import LowRankConv2d
from dlrt.hooks import watching
from dlrt.linear import LowRankLinear

Shape = tuple[int, ...]
Calls = dict[nn.Module, list[Shape]]
CONVOLUTIONS = (nn.Conv2d, LowRankConv2d)
LAST = "channels-last ones"
EXTRA_TOKENS = 8  # for the class, for distillation, and registers


class FeatureMaps(NamedTuple):
    """What a module gives: feature maps (N, C, height, width), or what can be laid out as such.

    Those are channels-last maps (N, height, width, C), and tokens (N, extra + height * width, C) of a
    transformer, of which the first ones, as the class token, have no place.
    """

    module: nn.Module
    size: tuple[int, int]
    layout: str = "maps"
    extra: int = 0

    def taken_apart(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """The tokens without a place (N, extra, C), if there are such, and maps (N, C, height, width)."""
        if self.layout == "maps":
            return None, y
        if self.layout == LAST:
            return None, y.permute(0, 3, 1, 2)
        return y[:, : self.extra], y[:, self.extra :].mT.unflatten(2, self.size)

    def put_together(self, extra: Tensor | None, maps: Tensor) -> Tensor:
        """The reverse."""
        if self.layout == "maps":
            return maps
        if self.layout == LAST:
            return maps.permute(0, 2, 3, 1)
        return torch.cat([extra, maps.flatten(2).mT], 1)


def spatial_layers(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """The modules that can be explained on an image (1, C, H, W), by name, in the order in which they end.

    Those that are called once and give feature maps of more than one pixel, with (height, width).
    """
    return {name: maps.size for name, maps in feature_maps(model, image).items()}


def default_layer(model: nn.Module, image: Tensor) -> str:
    """The name of the module that gives the output of the last convolutional block.

    The last one to end, of those at or after the last convolution whose output is as large as that of the
    convolution; a linear layer on channels-last maps is one, and a convolution that gives the class scores is
    not. Where attention to tokens ends the network, what the last attention gets: after it the class token
    alone counts. ValueError where there is no such module.
    """
    calls, layers = _looked_at(model, image)
    order = {module: number for number, module in enumerate(calls)}
    weighted = [module for module in calls if next(module.parameters(recurse=False), None) is not None]
    scores = weighted[-1] if weighted else None
    before = {name: maps for name, maps in layers.items() if order[maps.module] < order.get(scores, 0)}
    if isinstance(scores, CONVOLUTIONS) and any(map(_convolves, before.values())):
        layers = before
    convolutions = [name for name, maps in layers.items() if _convolves(maps)]
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no convolution with an output larger than one pixel")
    last = layers[convolutions[-1]]
    end = max(order[maps.module] for maps in layers.values() if maps.layout != "tokens")
    if attention := [module for module in calls if _attends(module) and order[module] > end]:
        return _attended(model, layers, order, attention[-1])
    same = [name for name, maps in layers.items() if order[maps.module] >= order[last.module]]
    return [name for name in same if layers[name].size == last.size and not _is_identity(layers[name])][-1]


def _attended(
    model: nn.Module, layers: dict[str, FeatureMaps], order: dict[nn.Module, int], attention: nn.Module
) -> str:
    """The name of the last tokens, or maps, that are there before an attention."""
    inside = set(attention.modules())
    found = [
        name
        for name, maps in layers.items()
        if order[maps.module] < order[attention] and maps.module not in inside and maps.layout == "tokens"
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} attends to something that cannot be laid out as maps, and what comes "
            f"before is no explanation of it: name a layer, one of {', '.join([*layers][-12:])}"
        )
    return found[-1]


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, FeatureMaps]:
    """The modules that are called once and give feature maps of more than one pixel, by name.

    Their layout shows on a picture of twice the height: the size that changes with it is the height of the
    maps. Where the network takes no other picture, maps are taken to have the proportions of the picture.
    Tokens are as many as maps before them have pixels, and a few more.
    """
    return _looked_at(model, image)[1]


def _looked_at(model: nn.Module, image: Tensor) -> tuple[Calls, dict[str, FeatureMaps]]:
    """What every module gives, in the order in which they end, and the feature maps among it."""
    names = {module: name for name, module in model.named_modules() if name}
    pair = image.repeat(2, 1, 1, 1)  # tables of positions and the like have not the size of the batch
    calls, of_tall = _watch(model, pair, {}), {}
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):
        _watch(model, pair.repeat(1, 1, 2, 1), of_tall)  # until where it cannot go on
    found: dict[str, FeatureMaps] = {}
    for module, shapes in calls.items():
        shape = shapes[0]
        if module is model or len(shapes) > 1 or len(shape) not in (3, 4) or len(pair) != shape[0]:
            continue
        if len(shape) == 3:
            sizes = [maps.size for maps in found.values() if 0 <= shape[1] - prod(maps.size) <= EXTRA_TOKENS]
            if sizes:
                extra = shape[1] - prod(sizes[-1])
                found[names[module]] = FeatureMaps(module, sizes[-1], "tokens", extra)
            continue
        if module in of_tall:
            last = shape[1] != of_tall[module][0][1]
        else:
            last = _apart(shape[1:3], image) < _apart(shape[2:], image)
        size = shape[1:3] if last else shape[2:]
        if size != (1, 1):
            found[names[module]] = FeatureMaps(module, size, LAST if last else "maps")
    return calls, found


def _convolves(maps: FeatureMaps) -> bool:
    linear = maps.layout == LAST and isinstance(maps.module, (nn.Linear, LowRankLinear))
    return linear or isinstance(maps.module, CONVOLUTIONS)


def _attends(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _is_identity(maps: FeatureMaps) -> bool:
    return isinstance(maps.module, nn.Dropout)  # in evaluation mode


def _watch(model: nn.Module, images: Tensor, calls: Calls) -> Calls:
    """Note the shapes of what every module gives, in the order in which they end; () for no tensor."""

    def watch(module: nn.Module, _: tuple[Tensor, ...], y: object) -> None:
        calls.setdefault(module, []).append(tuple(y.shape) if isinstance(y, Tensor) else ())

    with torch.no_grad(), watching(model, model.modules(), watch):
        model(images)
    return calls


def _apart(size: Shape, image: Tensor) -> float:
    """How far a size (height, width) is from the proportions of an image."""
    return abs(log(size[0] * image.shape[3] / (size[1] * image.shape[2])))
