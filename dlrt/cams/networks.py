"""A network to explain, and all that must be known to show it pictures."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import dlrt
from dlrt.cams.pictures import Picture
from dlrt.cams.spatial import spatial_layers
from dlrt.cams.targets import class_number
from dlrt.errors import one_line
from dlrt.layers import LowRankLayer


@dataclass(frozen=True)
class Network:
    """A model in evaluation mode, and how pictures are made its input.

    shape (channels, height, width) is the input's, mean and std those of its channels, of pixels in [0, 1];
    classes are names. trained is the shape that it was trained at. title is what a figure calls it.
    """

    label: str
    model: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    trained: tuple[int, int, int]
    title: str = "dense"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def blank(self) -> Tensor:
        """An input (1, channels, height, width) without content."""
        return torch.zeros(1, *self.shape, device=self.device)

    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, channels, height, width), on the network's device."""
        x = torch.stack([picture.tensor(self.shape, self.mean, self.std) for picture in pictures])
        return x.to(self.device)

    def class_number(self, text: str) -> int:
        return class_number(text, self.classes)


def placed(network: Network, size: int | None, device: str) -> Network:
    """The network on a device, and told to see pictures of another size; ValueError where it cannot."""
    if len(network.shape) != 3:
        raise ValueError(f"{network.label} must take pictures, got a network for text")
    if size:
        network = replace(network, shape=(network.shape[0], size, size))
    network.model.to(device, memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            network.model(network.blank)
    except (RuntimeError, AssertionError) as error:  # torchvision's vision transformers assert
        height, width = network.shape[1:]
        reason = one_line(str(error))
        raise ValueError(f"{network.label} cannot see {width} x {height} pixels ({reason})") from error
    return network


def warn(nets: Sequence[Network]) -> None:
    """Say on stderr, once of each size, when a network sees another one than it was trained at."""
    first: dict[tuple[int, int, int], Network] = {}
    for network in nets:
        first.setdefault(network.trained, network)
    for network in first.values():
        if network.shape != network.trained:
            size, trained = (f"{shape[2]} x {shape[1]}" for shape in (network.shape, network.trained))
            print(
                f"warning: {network.label} was trained at {trained} pixels and now sees {size}; "
                "its predictions may be worth nothing there",
                file=sys.stderr,
            )


def warn_if_larger(network: Network) -> None:
    """Say on stderr when the factors of a network are larger than the weights that they stand for."""
    layers = [module for module in network.model.modules() if isinstance(module, LowRankLayer)]
    dense = sum(m * n for m, n in (layer.shape for layer in layers))
    factors = sum(layer.rank * sum(layer.shape) for layer in layers)
    if factors > dense:
        print(
            f"warning: {network.label} is larger than its dense network: its factors have {factors:,} "
            f"parameters, {100 * (factors / dense - 1):.0f} % more than the weights; take lower ranks "
            "(compression counts a layer as no more than its weight)",
            file=sys.stderr,
        )


def check_alike(nets: Sequence[Network], layer: str) -> None:
    """ValueError where a network cannot be compared with the first one at a layer, or not by its name."""
    first = nets[0]
    size = spatial_layers(first.model, first.blank)[layer]
    for network in nets:
        if network.classes != first.classes or network.shape != first.shape:
            both = " and ".join(
                f"{net.label} ({len(net.classes)} classes, {' x '.join(map(str, net.shape))} pixels)"
                for net in (first, network)
            )
            raise ValueError(f"only networks of the same classes and input can be compared, got {both}")
        own_size = spatial_layers(network.model, network.blank).get(layer)
        if own_size != size:
            raise ValueError(
                f"the layer {layer} must give maps of {size} in every network, got {own_size} in "
                f"{network.label}: choose a --target-layer that all have"
            )
        if [net.label for net in nets].count(network.label) > 1:
            raise ValueError(f"two networks are called {network.label}: give every folder a name of its own")


def truncated(
    network: Network,
    tau: float | None = None,
    rank: int | float | None = None,
    compression: float | None = None,
    skip: Sequence[str] = (),
) -> Network:
    """A copy with a truncated SVD in every layer, compression in %. ValueError where it is low-rank already.

    A line on stderr names what stays dense.
    """
    if dlrt.compression(network.model).compressed:
        raise ValueError(f"{network.label} is low-rank already: its ranks are those of the checkpoint")
    share = None if compression is None else compression / 100
    with warnings.catch_warnings(record=True) as dense:
        warnings.simplefilter("always")
        model = dlrt.to_low_rank(deepcopy(network.model), rank, tau, skip, compression=share)
    for line in _by_reason(str(warning.message) for warning in dense):
        _tell_once(f"warning: {line}")
    given = {
        name: value
        for name, value in (("tau", tau), ("rank", rank), ("compression", compression))
        if value is not None
    }
    label = "".join(f"_{name}{value if name == 'rank' else f'{value:g}'}" for name, value in given.items())
    title = "low-rank" if tau is None else f"low-rank, τ = {tau:g}"
    if rank is not None:
        title = f"{100 * rank:g} % of full rank" if isinstance(rank, float) else f"rank {rank}"
    return replace(network, model=model, label=f"{network.label}_svd{label}", title=titled(title, model))


def titled(name: str, model: nn.Module) -> str:
    return f"{name}\ncompression {dlrt.compression(model).evaluation_compression:.0f} %"


def _by_reason(messages: Iterable[str]) -> list[str]:
    """Of warnings "NAME stays dense: REASON" a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, stays, reason in (message.partition(" stays ") for message in messages):
        names.setdefault(stays + reason, []).append(name)
    others = {
        reason: f", as {len(layers) - 1} others," if len(layers) > 1 else ""
        for reason, layers in names.items()
    }
    return [f"{layers[0]}{others[reason]}{reason}" for reason, layers in names.items()]


@functools.cache
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)
